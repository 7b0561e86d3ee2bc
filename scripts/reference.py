#!/usr/bin/env python
"""Write what docs/reference/ says of the commands and of the JSON that they print: scripts/reference.py"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fope_export.cli import parser
from fope_export.records import RECORDS, schema

FOLDER = Path(__file__).parent.parent / "docs/reference"
COMMON = "json", "quiet", "verbose", "traceback"
HEAD = """\
# Commands

`fope-export COMMAND --help` says the same. Each command also has `--json` (the result as JSON, and an error as one JSON
object on stderr), `--quiet`, `--verbose` and `--traceback`; [exit codes](../interface.md) are the same for all.
`fope-export --version` prints the version, `fope-export --print-completion SHELL` a script that completes commands.
"""


RECORDS_HEAD = """\
# JSON

What each command prints on stdout with `--json`, and an error on stderr; the reports in a bundle are the same.
The keys below stay, and more may come. The links are JSON Schemas, which say the same of all that lies within.
"""


def main() -> None:
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def files() -> dict[Path, str]:
    """What is written, by path."""
    schemas = {name: schema(name) for name in RECORDS}
    pages = {"commands.md": commands(), "json.md": records(schemas)}
    texts = pages | {f"schemas/{name}.json": json.dumps(each, indent=1) + "\n" for name, each in schemas.items()}
    return {FOLDER / name: text for name, text in texts.items()}


def records(schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of JSON."""
    return "\n".join([RECORDS_HEAD, *(record(name, each) for name, each in schemas.items())])


def record(name: str, document: Mapping[str, Any]) -> str:
    """A document, with a row for each of its keys; a document of several kinds has them one after the other."""
    known = document.get("$defs", {})

    def rows(kind: Mapping[str, Any]) -> Iterator[str]:
        if reference := kind.get("$ref"):
            kind = known[reference.rpartition("/")[2]]
        if kind.get("type") == "array" and "$ref" in kind["items"]:
            yield "A list, whose items are:\n"
            yield from rows(kind["items"])
        elif properties := kind.get("properties"):
            if told := kind.get("description"):
                yield f"{told}\n"
            yield "| key | |\n|---|---|"
            for key, each in properties.items():
                absent = "" if key in kind["required"] else ", or absent"
                yield f"| `{key}` | {in_words(each)}{absent} |"
            yield ""
        else:
            yield f"{in_words(kind).capitalize()}.\n"

    kinds = document.get("anyOf", [document])
    return "\n".join([f"## [{name}](schemas/{name}.json)\n", *(row for kind in kinds for row in rows(kind))])


def in_words(kind: Mapping[str, Any]) -> str:
    """What a value is."""
    if reference := kind.get("$ref"):
        return str(reference).rpartition("/")[2]
    if several := kind.get("anyOf"):
        return " or ".join(map(in_words, several))
    if fixed := kind.get("enum", [kind["const"]] if "const" in kind else None):
        return " or ".join(f"`{json.dumps(each)}`" for each in fixed)
    if kind.get("type") == "array":
        each = dict.fromkeys(map(in_words, kind.get("prefixItems", [kind.get("items")])))
        return f"list of {' or '.join(each)}"
    if kind.get("type") == "object" and (values := kind.get("additionalProperties")):
        return f"object of {in_words(values)}"
    return str(kind.get("type", "any"))


def commands() -> str:
    """The page of commands."""
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
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
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
