"""What README and docs/ show in fences, and which of it needs more than a CPU and this package."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NUMBER = r"[\\\d.,]*\d"
SHOWN = "text", "yaml"
"""Languages of what is not run: formulas, what something looks like, and what CI services read."""


class Block(NamedTuple):
    """A fence: its language, its title, which says what it needs that a test of pages has not, and what is in it."""

    language: str
    needs: str
    text: str

    def commands(self) -> Iterator[tuple[list[str], str]]:
        """Of a shell: the words of each command, and what it is said to print."""
        prompt = "$ " if self.language == "console" else ""
        for told in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:] if prompt else self.text.splitlines():
            command, _, printed = told.replace("\\\n", "").partition("\n")
            if words := shlex.split(command, comments=True):
                yield words, printed


def blocks(page: str) -> list[Block]:
    """The fences of a page, in their order."""
    return [Block(*each) for each in FENCE.findall(PAGES[page].read_text())]


def like(printed: str) -> str:
    """A pattern for what is alike but for numbers and blanks; a line of `…` is any number of lines."""
    lines = (r"(?:.*\n)*?" if line == "…" else f"{pattern(line)}\n" for line in printed.splitlines())
    return "".join(lines)


def pattern(line: str) -> str:
    """For one line."""
    words = (re.sub(NUMBER, lambda _: NUMBER, re.escape(word)) for word in line.split())
    return rf"[ ]*{'[ ]+'.join(words)}[ ]*"
