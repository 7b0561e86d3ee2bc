"""What CONTRIBUTING says is to be edited for a new thing is there, and is all."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"^### (Add an? [^\n]+)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))
OWN = "NAME"
"""Stands for the new thing's name."""
NAMED = re.compile(r"`(\w+)`\s+(?:of|in)\s+`([\w/.]+)`")


def files(recipe: str) -> set[str]:
    """The files that it names."""
    quoted = re.findall(r"`([^`\n]+)`", RECIPES[recipe])
    return {name for name in quoted if OWN not in name and Path(name).suffix}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_files_of_a_recipe_exist(recipe: str) -> None:
    named = files(recipe)
    assert len(named) >= 2 and not [name for name in named if not (ROOT / name).is_file()]


def test_what_a_recipe_says_is_in_a_file_is_there() -> None:
    pairs = [pair for text in RECIPES.values() for pair in NAMED.findall(text)]
    assert len(pairs) >= 6
    for name, path in pairs:
        assert re.search(rf"^(class |def )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{name} in {path}"


def test_a_spectrum_field_is_written_where_the_recipe_says() -> None:
    """Judged by one that there is."""
    sources = [path for kind in ("py", "h", "cuh", "cpp") for path in ROOT.glob(f"fope_export/**/*.{kind}")]
    sources += (ROOT / "plugins").glob("**/*.*")
    writing = {str(path.relative_to(ROOT)) for path in sources if re.search(r"\bsin_pad\b", path.read_text())}
    assert writing and writing <= files("Add a spectrum field")
