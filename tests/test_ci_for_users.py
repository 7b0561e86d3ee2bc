"""What a user's CI is made of, run as the services run it: the action, GitLab's job and the pre-commit hook."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
import yaml

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.shipped import shipped

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SHORT = "--lengths 64"


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def run(line: str, folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As the services' runners do: bash that stops at the first error, in a checkout, with the step's variables."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | dict(variables)
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", line]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def filled(text: str, inputs: Mapping[str, str]) -> str:
    """A step's value with the action's inputs in it."""
    text = text.replace("${{ github.action_path }}", str(ROOT))
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda name: inputs[name[1]], text)


def act(folder: Path, **given: str) -> tuple[dict[str, int], str]:
    """Exit codes of the action's steps that are run after one another by their names, and the job's page. Installing is
    another test's; what is not a command of ours (`uses`) is the service's.
    """
    action = read("action.yml")
    inputs = {name: given.get(name.replace("-", "_"), row.get("default", "")) for name, row in action["inputs"].items()}
    codes: dict[str, int] = {}
    for step in action["runs"]["steps"]:
        always = "cancelled" in step.get("if", "")
        if "run" in step and step["name"] != "Install" and (always or not any(codes.values())):
            variables = {name: filled(value, inputs) for name, value in step["env"].items()}
            done = run(step["run"], folder, variables | {"GITHUB_STEP_SUMMARY": str(folder / "page.md")})
            codes[step["name"]] = done.returncode
    page = folder / "page.md"
    return codes, page.read_text() if page.exists() else ""


@pytest.mark.whole
def test_the_action_exports_validates_and_tells(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").symlink_to(shipped("fope"))
    codes, page = act(tmp_path, checkpoint="checkpoint", validate_options=SHORT)
    assert codes == {"Export": 0, "Validate": 0, "Summary": 0} and page.startswith("### parity: passed")
    assert {path.name for path in (tmp_path / "parity").iterdir()} == {"parity.json", "parity.html", "parity.xml"}
    suite = Xml.parse(tmp_path / "parity" / "parity.xml").getroot()
    assert float(suite.attrib["time"]) > 0 and {case.attrib["classname"] for case in suite} == {
        "fope_export.parity.bundle"
    }
    broken = tmp_path / "broken"
    broken.mkdir()
    codes, page = act(broken, checkpoint="nowhere")
    assert codes == {"Export": 2, "Summary": 0} and not page


@pytest.mark.whole
def test_a_tampered_bundle_turns_it_red(tmp_path: Path) -> None:
    assert main(["export", str(shipped("fope")), str(tmp_path / "bundle")]) == 0
    tamper(tmp_path / "bundle")
    step = next(step for step in read("action.yml")["runs"]["steps"] if step.get("name") == "Validate")
    done = run(step["run"], tmp_path, {"BUNDLE": "bundle", "REPORTS": "parity", "OPTIONS": SHORT})
    assert done.returncode == 1 and "FAIL" in done.stdout
    assert Xml.parse(tmp_path / "parity" / "parity.xml").getroot().attrib["failures"] != "0"


def tamper(bundle: Path) -> None:
    """Change one weight by much."""
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(100_000)
        file.write(b"\x7f\x7f" * 64)


def test_the_action_installs_from_its_own_folder() -> None:
    steps = read("action.yml")["runs"]["steps"]
    (install,) = (step for step in steps if step.get("name") == "Install")
    assert install["run"].endswith('"$SOURCE[cpu]"') and filled(install["env"]["SOURCE"], {}) == str(ROOT)
    assert all(step["uses"].count("@v") == 1 for step in steps if "uses" in step)
    assert all("${{" not in step["run"] for step in steps if "run" in step)  # inputs are no code


@pytest.mark.whole
def test_gitlabs_job_does_the_same(tmp_path: Path) -> None:
    job = read("templates/gitlab.yml")[".fope-export"]
    variables = job["variables"] | {"CHECKPOINT": str(shipped("fope")), "VALIDATE_OPTIONS": SHORT}
    install, *lines = job["script"]
    assert "pip install" in install
    assert [run(line, tmp_path, variables).returncode for line in lines] == [0, 0]
    assert (tmp_path / job["artifacts"]["reports"]["junit"].replace("$REPORTS", variables["REPORTS"])).is_file()
    tamper(tmp_path / "bundle")
    assert run(lines[-1], tmp_path, variables).returncode == 1


def test_the_hook_refuses_what_is_not_as_it_was_validated(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hook,) = read(".pre-commit-hooks.yaml")
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    assert main(["validate", str(folder), *SHORT.split()]) == 0
    capsys.readouterr()
    staged = [path.relative_to(tmp_path).as_posix() for path in folder.rglob("*") if path.is_file()]
    concerned = [name for name in staged if re.search(hook["files"], name)]
    assert {Path(name).name for name in concerned} >= {
        "fope_export.json",
        "model.onnx",
        "model.onnx.data",
        "parity.json",
    }
    line = " ".join([hook["entry"], *concerned])
    done = run(line, tmp_path, {})
    assert done.returncode == 0 and done.stdout == "bundle: whole, and validated as it is\n"
    (folder / "reports" / "parity.json").unlink()
    assert main(["check", str(folder)]) == 1
    assert "was not validated" in capsys.readouterr().out
    tamper(folder)
    done = run(line.replace("bundle/reports/parity.json", ""), tmp_path, {})
    assert done.returncode == 1 and "model.onnx.data" in done.stdout
