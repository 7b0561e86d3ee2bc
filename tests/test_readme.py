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


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "checkpoint").symlink_to(shipped("fope"))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    program, *arguments = shlex.split(command)
    assert program == "fope-export" and main(arguments) == 0


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(snippet: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    exec(snippet, {})


def test_there_is_something_to_test_and_what_is_shown_exists() -> None:
    assert len(COMMANDS) >= 5 and len(SNIPPETS) >= 2
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for script in ("scripts/demo", "scripts/test"):
        assert script in README and (ROOT / script).stat().st_mode & 0o111
