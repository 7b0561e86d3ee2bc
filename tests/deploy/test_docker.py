"""The folder for containers: its Dockerfile, compose file and dashboard, without a daemon, and the image where there is
one.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fope_export.cli import parser
from tests.deploy.servers import SECONDS, free_port
from tests.serving.served import Served, served

HADOLINT = Path(sys.executable).with_name("hadolint")
ROOT = Path(__file__).parents[2]
SERVICE = {
    "build", "image", "command", "ports", "init", "read_only", "tmpfs", "cap_drop", "security_opt", "stop_grace_period",
    "restart", "volumes", "environment", "depends_on", "deploy",
}  # fmt: skip
"""What a service of the compose specification may have, of what is used."""


@pytest.fixture(scope="module")
def folder(folder_for: Callable[[str], Path]) -> Path:
    return folder_for("docker")


@pytest.fixture(scope="module")
def compose(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text())
    return read


@pytest.fixture(scope="module")
def dockerfile(folder: Path) -> list[str]:
    """Its instructions."""
    joined = (folder / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    """What the container runs, without the container."""
    with served([folder / "bundle"], "--served-model-name", "small", "--unvalidated") as running:
        yield running


def instruction(dockerfile: list[str], name: str) -> str:
    """The last of its kind."""
    return [line.removeprefix(f"{name} ") for line in dockerfile if line.startswith(f"{name} ")][-1]


def test_hadolint_finds_nothing(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run([HADOLINT, folder / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    spoiled = tmp_path / "Dockerfile"
    spoiled.write_text((folder / "Dockerfile").read_text().replace("USER 1000", "USER root"))
    assert subprocess.run([HADOLINT, spoiled], capture_output=True).returncode == 1


def test_the_image_runs_what_the_package_has(dockerfile: list[str], compose: dict[str, Any], server: Served) -> None:
    program, *arguments = json.loads(instruction(dockerfile, "ENTRYPOINT"))
    args = parser().parse_args([*arguments, *compose["services"]["server"]["command"]])
    assert program == "fope-export" and args.function.__name__ == "serve" and args.host == "0.0.0.0"
    assert args.unvalidated and [*map(str, args.bundles)] == ["/bundle"] and args.served_model_name == ["small"]
    ending = float(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert args.drain < ending and instruction(dockerfile, "EXPOSE") == str(args.port)
    assert instruction(dockerfile, "USER") == "1000"
    _, _, health = instruction(dockerfile, "HEALTHCHECK").partition("CMD ")
    python, *call = json.loads(health)
    for port, code in ((server.port, 0), (free_port(), 1)):
        asked = [word.replace(":8000", f":{port}") for word in call]
        assert python == "python"
        assert subprocess.run([sys.executable, *asked], capture_output=True).returncode == code


def test_what_is_copied_is_there(folder: Path, dockerfile: list[str]) -> None:
    copied = [line.split()[-2] for line in dockerfile if line.startswith("COPY ")]
    ignored, *kept = (folder / ".dockerignore").read_text().split()
    assert ignored == "*" and {f"!{name}" for name in copied} == {*kept}
    assert all((folder / name).is_dir() for name in copied)


def test_compose_publishes_to_this_machine_alone(folder: Path, compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services.keys() == {"server", "prometheus", "grafana"}
    for name, service in services.items():
        assert service.keys() <= SERVICE, name
        assert service["ports"] and all(
            re.match(r"127\.0\.0\.1:|\$\{HOST:-127\.0\.0\.1\}:", p) for p in service["ports"]
        )
        assert {*service.get("depends_on", ())} <= services.keys() and ("build" in service or ":" in service["image"])
        for volume in service.get("volumes", ()):
            source, target, mode = volume.split(":")
            assert (folder / source).exists() and target.startswith("/") and mode == "ro"
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", compose["name"])
    more = yaml.safe_load((folder / "compose.cuda.yaml").read_text())["services"]["server"]
    assert more["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"


def test_each_part_finds_the_next(folder: Path, compose: dict[str, Any]) -> None:
    def read(name: str) -> Any:
        return yaml.safe_load((folder / name).read_text())

    services = compose["services"]
    (job,) = read("prometheus.yaml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target.split(":") == ["server", services["server"]["ports"][0].split(":")[-1]]
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].split(':')[-1]}"
    (provider,) = read("grafana/provisioning/dashboards/fope.yaml")["providers"]
    mounts = dict(volume.split(":")[1::-1] for volume in services["grafana"]["volumes"])
    boards = folder / mounts[provider["options"]["path"]]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    board = json.loads((boards / Path(home).name).read_text())
    uids = {panel["datasource"]["uid"] for panel in board["panels"]}
    assert uids == {source["uid"]} and Path(home).parent == Path(provider["options"]["path"])


def queries(folder: Path) -> list[str]:
    """Of the dashboard, as Grafana sends them."""
    board = json.loads((folder / "grafana/dashboards/fope.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [each.replace("$__rate_interval", "1m").replace("$model", ".*") for each in asked]


def parts(query: str) -> list[Any]:
    """All nodes of a query."""
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(query), found.append)
    return found


def test_the_dashboard_asks_for_what_the_server_has(folder: Path, server: Served) -> None:
    """Every metric of every query, with every label that it filters and groups by."""
    server.ask({"model": "small", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True})
    page = server.http.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = queries(folder)
    assert len(asked) >= 14
    for query in asked:
        selectors = [node for node in parts(query) if isinstance(node, promql_parser.VectorSelector)]
        groups = [node.modifier for node in parts(query) if isinstance(node, promql_parser.AggregateExpr)]
        named = {each.name for selector in selectors for each in selector.matchers.matchers}
        named |= {label for group in groups if group for label in group.labels}
        assert selectors and all(named <= labels[selector.name or ""] for selector in selectors), query
    shown = {name for query in asked for name in re.findall(r"fope_export_\w+", query)}
    kinds = r"_(created|count|sum)$"
    assert {name for name in labels if not re.search(kinds, name)} == shown  # and nothing that it has is left out


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of programs in which there is no docker."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env", "dirname"):
        (programs / name).symlink_to(which(name) or name)
    return programs


def start(folder: Path, programs: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": str(programs)} | more
    return subprocess.run([folder / "start"], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("docker", "message"),
    [
        ("", "docker is not installed"),
        ("[ $1 != compose ]", "docker has no compose"),
        ("[ $1 != info ]", "no Docker daemon answers here"),
    ],
)
def test_start_says_what_is_missing(docker: str, message: str, folder: Path, bare: Path) -> None:
    if docker:
        write(bare / "docker", docker)
    done = start(folder, bare)
    assert done.returncode == 2 and message in done.stderr and "next: " in done.stderr and not done.stdout


def test_start_runs_compose_in_the_foreground(folder: Path, bare: Path) -> None:
    write(
        bare / "docker",
        'case "$*" in "compose version" | info) ;; *) echo "$HOST:$PORT $VARIANT $PWD $*"; exit 3 ;; esac',
    )
    for variant, files in (("cpu", "compose.yaml"), ("cuda", "compose.yaml --file compose.cuda.yaml")):
        done = start(folder, bare, VARIANT=variant, PORT="8123")
        told = f"127.0.0.1:8123 {variant} {folder} compose --file {files} up --build\n"
        assert (done.returncode, done.stdout) == (3, told)
    done = start(folder, bare, VARIANT="tpu")
    assert done.returncode == 2 and "there is no variant tpu" in done.stderr


def write(program: Path, text: str) -> None:
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)


def test_the_image_is_built_and_answers(folder: Path) -> None:
    if not which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("needs a Docker daemon")
    wheel: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder / "wheels",
        ROOT,
    ]
    subprocess.run(wheel, check=True)
    subprocess.run(["docker", "build", "--tag", "fope-export-test", folder], check=True)
    port, name = free_port(), f"fope-export-{os.getpid()}"
    run = ["docker", "run", "--rm", "--detach", "--name", name, "--publish", f"127.0.0.1:{port}:8000"]
    subprocess.run([*run, "--read-only", "--tmpfs", "/tmp", "fope-export-test", "--unvalidated"], check=True)
    try:
        environment = os.environ | {"PORT": str(port), "WAIT": str(SECONDS)}
        done = subprocess.run([folder / "check"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["docker", "stop", name], check=True)
