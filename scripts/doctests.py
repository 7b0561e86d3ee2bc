"""For the reference of Python: examples in docstrings become fenced blocks; Markdown would take them for quotations."""

import re
from typing import Any

import griffe

EXAMPLES = re.compile(r"(?m)^>>> .*(?:\n(?!\n).*)*")
"""Each begins with a prompt, and an empty line ends it."""


class Doctests(griffe.Extension):  # type: ignore[misc]
    """An extension of the collector that mkdocstrings reads the package with."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Fence the examples of one class, function or module."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """It, with every example in a fence."""
    return EXAMPLES.sub(lambda example: f"```pycon\n{example[0]}\n```", docstring)
