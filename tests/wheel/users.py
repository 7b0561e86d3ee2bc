"""Environments as users make them: what is installed comes from the built wheel and the package index, and nothing of
this checkout can be imported. PyTorch alone, which is large, is lent by the environment that the tests run in.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from tests.pages import ROOT, Block, blocks, like

SETS = {"usual": ROOT / "constraints.txt"} | {
    name: ROOT / f"constraints-{name}.txt" for name in ("lowest", "newest")
}  # fmt: skip
HINT = re.compile(r"^hint: +(pip install .*)$", re.MULTILINE)
KEPT = ("HOME", "LANG", "PATH", "TMPDIR", "XDG_CACHE_HOME")
"""What a user's commands get of the environment here, with what configures pip."""


@dataclass(frozen=True)
class User:
    """An environment in `folder`, whose pip takes the versions of one of SETS, and the place where its user stands."""

    folder: Path
    versions: str
    place: Path

    @classmethod
    def create(cls, folder: Path, versions: str) -> "User":
        """A new one, with pip alone."""
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
        (folder / "here").mkdir()
        return cls(folder / "env", versions, folder / "here")

    def lend_torch(self) -> None:
        """Give it PyTorch as if it were installed, but not what that needs."""
        lent = distribution("torch")
        (here,) = self.folder.glob("lib/python*/site-packages")
        for name in {part for file in lent.files or () if (part := file.parts[0]) != ".."}:
            (here / name).symlink_to(Path(str(lent.locate_file(name))))

    def do(self, *words: str, place: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command as it is typed where this environment is activated."""
        kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(("PIP_", "SSL_"))}
        own = {
            "PATH": f"{self.folder / 'bin'}:{kept['PATH']}", "VIRTUAL_ENV": str(self.folder), "COLUMNS": "200",
            "PIP_CONSTRAINT": str(SETS[self.versions]), "FOPE_EXPORT_CACHE": str(self.folder.parent / "cache"),
        }  # fmt: skip
        command = [str(self.folder / "bin" / words[0]), *words[1:]]
        return subprocess.run(command, cwd=place or self.place, env=kept | own, capture_output=True, text=True)

    def done(self, *words: str, place: Path | None = None) -> str:
        """What a command prints that must work."""
        done = self.do(*words, place=place)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout

    def told_to(self, *words: str) -> list[str]:
        """The command that a refusal says to install with."""
        done = self.do(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (words, done.stderr)
        told = HINT.search(done.stderr)
        assert told, (words, done.stderr)
        return shlex.split(told[1])

    def follow(self, *verbs: str) -> None:
        """Type README's commands, all or those of these verbs, and find what is said to be printed."""
        steps = [step for block in blocks("README.md") if block.language == "console" for step in block.commands()]
        chosen = [(words, printed) for words, printed in steps if not verbs or words[1] in verbs]
        assert len(chosen) >= max(len(verbs), 1)
        for words, printed in chosen:
            told = self.done(*words)
            assert not printed or re.fullmatch(like(printed), told if told.endswith("\n") else f"{told}\n"), told

    def packages(self) -> dict[str, str]:
        """Versions of what is installed, but for pip and what comes with it."""
        told: list[dict[str, Any]] = json.loads(self.done("pip", "list", "--format", "json"))
        return {each["name"]: each["version"] for each in told if each["name"] not in ("pip", "setuptools")}


def installs() -> list[list[str]]:
    """README's commands that install: from a folder, from git, from a wheel."""
    steps = [step for block in blocks("README.md") if block.needs == "installs packages" for step in block.commands()]
    return [words for words, _ in steps if words[0] == "pip"]


def from_wheel(wheel: Path) -> list[str]:
    """The last of these, where the wheel lies elsewhere than beside the user."""
    *_, (*words, named) = installs()
    assert named.startswith(wheel.name), f"README.md has {named}, and what is built is {wheel.name}"
    return [*words, named.replace(wheel.name, str(wheel))]


def snippets() -> list[Block]:
    """README's Python."""
    return [block for block in blocks("README.md") if block.language == "python" and not block.needs]
