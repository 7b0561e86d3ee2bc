#!/usr/bin/env python
"""Write docs/reference/commands.md from what the program says of itself: scripts/reference.py"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from fope_export.cli import parser

PAGE = Path(__file__).parent.parent / "docs/reference/commands.md"
COMMON = "json", "quiet", "verbose", "traceback"
HEAD = """\
# Commands

`fope-export COMMAND --help` says the same. Each command also has `--json` (the result as JSON, and an error as one JSON
object on stderr), `--quiet`, `--verbose` and `--traceback`; [exit codes](../interface.md) are the same for all.
`fope-export --version` prints the version, `fope-export --print-completion SHELL` a script that completes commands.
"""


def main() -> None:
    PAGE.write_text(written())


def written() -> str:
    """The page."""
    (commands,) = (each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    return "\n".join([HEAD, *(section(name, sub) for name, sub in commands.choices.items())])


def section(name: str, sub: argparse.ArgumentParser) -> str:
    """A command, with a row for each thing that it takes."""
    rows = [f"| {called(each)} | {cell(sub, each)} |" for each in taken(sub)]
    return "\n".join(
        [f"## {name}\n", f"{sub.description}\n", *(["| takes | |", "|---|---|", *rows, ""] if rows else [])]
    )


def taken(sub: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All but help and what every command takes."""
    return (each for each in sub._actions if each.dest not in ("help", *COMMON))


def called(action: argparse.Action) -> str:
    """As it is typed, with what follows it."""
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
    value = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar or choices
    if not action.option_strings:
        return f"`{value}`"
    names = " ".join(f"`{each}`" for each in action.option_strings)
    return names if action.nargs == 0 else f"{names} `{value}`"


def cell(sub: argparse.ArgumentParser, action: argparse.Action) -> str:
    """What help says of it, with nothing that Markdown would take for its own."""
    told = sub._get_formatter()._expand_help(action) if action.help else ""
    return told.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
