"""The folders that `deploy` writes, what it refuses, and how their `check` asks."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.deploy import TARGETS
from fope_export.deploy.base import FILES, fill
from fope_export.deploy.run import CHECK, CLEAR
from fope_export.manifest import REPORTS
from fope_export.place import COMMITTED
from fope_export.validated import REPORT
from tests.deploy.lone import Lone
from tests.printed import held
from tests.serving.served import served

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def validated(bundle: Bundle, tmp_path: Path) -> Path:
    """A small bundle with a report."""
    folder = Path(shutil.copytree(bundle.path, tmp_path / "out"))
    assert main(["validate", str(folder), "--lengths", "5,64"]) == 0
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_has_what_starts_and_checks_it(target: str, bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    made = tmp_path / "new"
    command = ["deploy", str(bundle.path), "--target", target, str(made), "--unvalidated", "--json"]
    assert main(command) == 0
    told = held("deploy", capsys.readouterr().out)
    assert told["expected"] == json.loads((made / CHECK).read_text()) and told["folder"] == str(made)
    for name in ("start", "check"):
        assert os.access(made / name, os.X_OK) and (made / name).read_text().startswith("#!")
    assert bundle.path.name in (made / "README.md").read_text()
    (copy,) = (path.parent for path in made.rglob("fope_export.json"))
    assert Bundle.open(copy).manifest == bundle.manifest
    assert not [
        path for path in made.rglob("*") if path.is_file() and b"@@" in path.read_bytes() and copy not in path.parents
    ]
    assert not [path for path in tmp_path.iterdir() if path != made]


def test_what_is_validated_is_handed_over_with_its_report(validated: Path, tmp_path: Path, capsys: Capture) -> None:
    reports = Path(shutil.move(validated / REPORTS, tmp_path / "elsewhere"))
    command = ["deploy", str(validated), "--target", "docker"]
    assert main([*command, str(tmp_path / "new")]) == 2 and "was not validated" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "new"), "--report", str(reports), "--backend", "onnxruntime"]) == 0
    assert (tmp_path / "new/bundle" / REPORTS / REPORT).read_bytes() == (reports / REPORT).read_bytes()
    assert '["--backend", "onnxruntime"]' in (tmp_path / "new/compose.yaml").read_text()
    with served([tmp_path / "new/bundle"]) as server:  # as the container does, without --unvalidated
        assert server.http.get("/health/ready").status_code == 200


def test_check_passes_and_fails(validated: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert main(["deploy", str(validated), "--target", "docker", str(new), "--served-model-name", "one"]) == 0
    told = json.loads((new / CHECK).read_text())

    def check(**more: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"WAIT": "0"} | more
        return subprocess.run([new / "check"], env=environment, capture_output=True, text=True)

    (tmp_path / "key").write_text("secret")
    options = ["--served-model-name", "one", "--api-key-file", str(tmp_path / "key")]
    with served([new / "bundle"], *options) as server:
        port = {"PORT": str(server.port)}
        assert check(**port).returncode == 2
        done = check(**port, API_KEY="secret")
        assert done.returncode == 0 and repr(told["text"]) in done.stdout, done.stderr
        (new / CHECK).write_text(json.dumps(told | {"text": "another"}))
        done = check(**port, API_KEY="secret")
        assert done.returncode == 1 and f"expected: 'another'\nfound:    {told['text']!r}" in done.stderr
        (new / CHECK).write_text(json.dumps(told | {"model": "two"}))
        done = check(**port, API_KEY="secret")
        assert done.returncode == 2 and "there is no model two, but one" in done.stderr
    done = check(**port)
    assert done.returncode == 2 and "next: ./start" in done.stderr and "Traceback" not in done.stderr


def test_what_is_expected_is_clear(folder_for: Callable[[str], Path], lone: Lone) -> None:
    told = json.loads((folder_for("docker") / CHECK).read_text())
    asked = {"prompt": told["prompt"], "max_tokens": told["max_tokens"] + 1, "temperature": 0.0}
    *kept, after = [each.top[0][1] - each.top[1][1] for each in lone.logprobs(asked, 2)]
    assert min(kept) >= CLEAR * 0.99 and (after < CLEAR * 1.01 or len(kept) == 16)
    assert told["text"] == lone.says(asked | {"max_tokens": told["max_tokens"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "docker", "--served-model-name", "a b"], "a model cannot be called 'a b'"),
        (["--target", "docker", "--served-model-name", "../x"], "a model cannot be called '../x'"),
        (["--target", "docker", "--backend", "abacus"], "there is no backend 'abacus'"),
        (["--target", "docker", "--backend", "torch"], "what torch runs is not in the bundle"),
        (["--target", "docker"], "was not validated"),
    ],
)
def test_refusals_write_nothing(
    arguments: list[str], message: str, bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["deploy", str(bundle.path), str(tmp_path / "new"), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and "hint:" in told and not [*tmp_path.iterdir()]


def test_a_folder_that_is_there_is_refused(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    command = ["deploy", str(bundle.path), "--target", "docker", "--unvalidated"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        assert main([*command, str(tmp_path / name)]) == 2 and "would be lost" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert main([*command, str(tmp_path / "empty")]) == 0 and (tmp_path / "empty/start").exists()


def test_a_folder_in_which_one_stands_is_filled(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", str(bundle.path), "--target", "triton", ".", "--unvalidated"]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"start", "check", "models", "README.md"}
    assert not [*tmp_path.glob(".fope_export*")]


def test_what_breaks_in_the_middle_leaves_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fope_export.deploy.base.shutil.copyfile", full)
    assert main(["deploy", str(bundle.path), "--target", "docker", str(tmp_path / "new"), "--unvalidated"]) == 2
    assert "No space left" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_what_was_cut_short_between_two_files_is_finished(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / COMMITTED / "models").mkdir(parents=True)
    (tmp_path / COMMITTED / "start").touch()
    command = ["deploy", str(bundle.path), "--target", "docker", "--unvalidated"]
    assert main([*command, str(tmp_path)]) == 2 and "would be lost" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"start", "models"}


def test_blanks_are_filled_or_missed() -> None:
    assert fill("a @@name $HOME ${x} @ @@{name}s", {"name": "b"}) == "a b $HOME ${x} @ bs"
    with pytest.raises(KeyError):
        fill("@@nothing", {})


def test_every_target_says_how_it_is_used() -> None:
    documented = (Path(__file__).parents[2] / "docs/deploy.md").read_text()
    for target in TARGETS:
        assert f"--target {target} " in documented, target
        assert "./check" in (FILES / target / "README.md").read_text() and (FILES / target / "start").is_file()
