"""What docs/serving.md shows works as it is printed."""

from typing import Any

import pytest

from tests.pages import blocks
from tests.serving.served import Served

HERE = "http://127.0.0.1:8000"
SHOWN = [block for block in blocks("docs/serving.md") if block.needs == "needs a server"]
COMMANDS = [words for block in SHOWN if block.language == "console" for words, _ in block.commands()]
ASKED = [words for words in COMMANDS if words[0] == "curl"]
SNIPPETS = [block.text for block in SHOWN if block.language == "python"]


@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_what_is_asked_with_curl(words: list[str], server: Served) -> None:
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
    assert len(ASKED) == 5 and len(SNIPPETS) == 2 and [*COMMANDS[0][:2]] == ["fope-export", "serve"]
