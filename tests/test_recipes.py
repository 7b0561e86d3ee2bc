"""CONTRIBUTING's recipes name files that there are, and what is in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPES = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
NAMED = re.compile(r"`(\w+)`\s(?:of|in)\s`([\w/.]+)`")


def recipes() -> str:
    (found,) = (section for section in RECIPES if section.startswith("Recipes"))
    return found


def test_every_file_is_there() -> None:
    paths = re.findall(r"`([\w/.]+/[\w/.]+)`", recipes())
    assert len(paths) >= 7 and [path for path in paths if not (ROOT / path).exists()] == []


def test_every_name_is_in_its_file() -> None:
    found = NAMED.findall(recipes())
    assert len(found) >= 5
    for name, path in found:
        assert re.search(rf"^(class |def )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{name} in {path}"
