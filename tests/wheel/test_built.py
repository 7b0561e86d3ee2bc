"""What is built: an sdist that has all that the wheel has, and no half of the tests."""

import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.pages import ROOT
from tests.wheel.conftest import Built, build

pytestmark = pytest.mark.whole


def contents(wheel: Path) -> dict[str, tuple[bytes, int]]:
    """Of each file, what is in it and its rights."""
    with ZipFile(wheel) as opened:
        return {each.filename: (opened.read(each), each.external_attr >> 16) for each in opened.infolist()}


def test_the_sdist_makes_the_wheel_that_the_tree_makes(built: Built, tmp_path: Path) -> None:
    build(built.tree, tmp_path, "--wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert contents(wheel) == contents(built.wheel)


def test_the_wheel_has_every_file_of_the_package(built: Built) -> None:
    made = {name for name in contents(built.wheel) if name.startswith("fope_export/")}
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "fope_export").rglob("*") if path.is_file()}
    kept |= {f"fope_export/{path.relative_to(ROOT)}" for path in (ROOT / "plugins").rglob("*") if path.is_file()}
    assert made == {name for name in kept if "__pycache__" not in name}


def test_the_sdist_has_no_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "fope_export/data/fope/model.safetensors"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_the_metadata_is_what_users_are_told(built: Built) -> None:
    (name,) = (name for name in contents(built.wheel) if name.endswith(".dist-info/METADATA"))
    told = Parser().parsestr(contents(built.wheel)[name][0].decode())
    assert told["Requires-Python"] == ">=3.11" and told["License-Expression"] == "Apache-2.0"
    assert told.get_payload() == (ROOT / "README.md").read_text()
    versions = [each.rpartition(" ")[2] for each in told.get_all("Classifier", ()) if " 3." in each]
    assert versions == ["3.11", "3.12", "3.13"] and not told.get_all("Project-URL")
