"""What docs/serving.md shows works as it is printed."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.serving.served import Served

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
HERE = "http://127.0.0.1:8000"
ASKED = re.findall(r"^\$ (curl (?:.*\\\n)*.*)$", TEXT, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("command", ASKED)
def test_what_is_asked_with_curl(command: str, server: Served) -> None:
    words = shlex.split(command.replace("\\\n", ""))
    (path,) = (word.removeprefix(HERE) for word in words if word.startswith(HERE))
    fields: dict[str, Any] = {"headers": {"Content-Type": "application/json"}} if "-H" in words else {}
    if "-d" in words:
        fields["content"] = words[words.index("-d") + 1].replace('"out"', '"model"')
    answer = server.http.request("POST" if "-d" in words else "GET", path, **fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(snippet: str, server: Served) -> None:
    exec(snippet.replace(HERE, server.url).replace('"out"', '"model"'), {})


def test_there_is_something_to_test() -> None:
    assert len(ASKED) == 5 and len(SNIPPETS) == 2
