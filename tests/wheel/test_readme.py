"""A new user's path, away from the repository: README as it is written, from the built wheel; without an extra what is
promised works, and the rest says how it is installed, which is then done.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fope_export.cli import parser
from tests.pages import ROOT
from tests.wheel.conftest import Built
from tests.wheel.users import User, from_wheel, installs, snippets

pytestmark = pytest.mark.whole
WHERE = "import fope_export, json, sys; print(json.dumps([fope_export.__file__, *sys.path]))"
WORK = (
    "inspect out", "check out", "doctor", "--help", "--version", "demo --copy rope copied", "--print-completion bash",
    "report summary out/reports/parity.json", "report compare out/reports/parity.json out/reports/parity.json",
)  # fmt: skip
"""Commands that need no extra."""
NEED = {
    "export checkpoint new": "export", "optimize out": "export", "inspect checkpoint": "export",
    "inspect out/model.onnx": "export", "build out": "tensorrt-rtx", "validate out": "validate",
    "validate out --stages": "validate", "evaluate out": "validate", "run out --prompt x": "run",
    "run out --prompt-ids 1": "run", "serve out": "serve", "deploy out --target docker new": "run",
    "bench out": "cpu", "demo --out new": "cpu",
}  # fmt: skip
"""The others, and the extra that brings what each needs first."""


@pytest.fixture(scope="module")
def reader(built: Built, user: Callable[[str], User]) -> User:
    """Who has installed `cpu` with torch there, and followed README."""
    made = user("usual")
    made.lend_torch()
    made.done(*from_wheel(built.wheel))
    made.follow()
    return made


@pytest.fixture(scope="module")
def bare(built: Built, reader: User, user: Callable[[str], User]) -> User:
    """Who has installed no extra, and has the reader's files."""
    made = user("usual")
    *words, named = from_wheel(built.wheel)
    made.done(*words, named.partition("[")[0])
    shutil.copytree(reader.place, made.place, dirs_exist_ok=True)
    return made


def test_nothing_of_the_checkout_is_imported(reader: User, bare: User) -> None:
    for each in (reader, bare):
        package, *path = json.loads(each.done("python", "-c", WHERE))
        assert Path(package).is_relative_to(each.folder)
        assert not [entry for entry in path if Path(entry).is_relative_to(ROOT)]


def test_snippets(reader: User) -> None:
    assert snippets()
    for block in snippets():
        assert reader.done("python", "-c", block.text)


def test_every_command_is_tried_without_an_extra() -> None:
    (commands,) = (each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    assert {command.split()[0] for command in (*WORK, *NEED)} >= set(commands.choices)


@pytest.mark.parametrize("command", WORK)
def test_what_needs_no_extra(command: str, bare: User) -> None:
    assert bare.done("fope-export", *command.split())


@pytest.mark.parametrize("command", NEED)
def test_what_names_its_extra(command: str, built: Built, bare: User) -> None:
    before = sorted(bare.place.rglob("*"))
    told = bare.told_to("fope-export", *command.split())
    assert told[-1] == f"fope-export[{NEED[command]}] @ {built.wheel.as_uri()}"
    assert sorted(bare.place.rglob("*")) == before


def test_what_does_not_load_is_told_by_the_doctor(reader: User, tmp_path: Path) -> None:
    (spoilt,) = reader.folder.glob("lib/python*/site-packages/onnxruntime/__init__.py")
    text = spoilt.read_text()
    try:
        spoilt.write_text("raise ImportError('libcuda.so.1: no such file')")
        told = json.loads(reader.done("fope-export", "doctor", "--json"))
    finally:
        spoilt.write_text(text)
    reasons = {what: reason for what, reason in told["abilities"].items() if "does not load" in reason}
    assert {"run the bundle in ONNX Runtime on the CPU", "validate a bundle"} <= reasons.keys()
    assert "export a checkpoint" not in reasons
    assert all("does not load: ImportError: libcuda.so.1: no such file" in each for each in reasons.values())


def test_readmes_other_ways_install_and_are_remembered(built: Built, reader: User) -> None:
    folder, git, _ = installs()
    reader.done(*folder, place=built.tree)
    assert reader.told_to("fope-export", "build", "out")[-1] == f"{built.tree}[tensorrt-rtx]"
    reader.done("pip", "uninstall", "--yes", "fope-export")  # pip is content with the version that is there
    clone = ROOT.as_uri().replace("//", "//localhost", 1)  # a URL with a host, as a requirement wants
    reader.done(*(word.replace("URL", clone) for word in git))
    assert f"[tensorrt-rtx] @ git+{clone}@" in reader.told_to("fope-export", "build", "out")[-1]


def test_what_is_told_to_install_is_what_was_missing(bare: User) -> None:
    """The last test: from no extra to what validates, by nothing but what refusals say."""
    for command in ("run out --prompt x --max-new-tokens 1", "inspect checkpoint", "validate out --lengths 7"):
        if command.startswith("inspect"):
            bare.lend_torch()
        bare.done(*bare.told_to("fope-export", *command.split()))
        bare.done("fope-export", *command.split())
