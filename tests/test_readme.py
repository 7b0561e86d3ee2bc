"""The README's commands and snippets work as they are printed."""

import re
import shlex
from pathlib import Path

import pytest

from fope_export.cli import main
from fope_export.demo import shipped

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0] for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checkpoint").symlink_to(shipped("fope"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_in_their_order(folder: Path) -> None:
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "fope-export" and main(arguments) == 0, command


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(snippet: str, folder: Path) -> None:
    exec(snippet, {})


def test_there_is_something_to_test_and_what_is_shown_exists() -> None:
    assert len(COMMANDS) >= 5 and len(SNIPPETS) >= 2
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for script in ("scripts/demo", "scripts/test"):
        assert script in README and (ROOT / script).stat().st_mode & 0o111
