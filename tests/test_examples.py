"""What help() says: every public name has an example, which runs here, and nothing public is left unexplained."""

import doctest
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fope_export
from fope_export import commands, dtypes
from fope_export.backends import base, memory, stacked
from fope_export.benchmark import greedy
from fope_export.benchmark.contenders import COMPILED, CONTENDERS
from fope_export.bundle import Bundle
from fope_export.graph import ways
from fope_export.parity.run import validate
from fope_export.report import write_parity

PACKAGE = Path(fope_export.__file__).parent
PROTOCOLS: tuple[type, ...] = (
    base.Backend, base.Slots, stacked.Stackable, memory.Device, greedy.Contender, ways.Way, dtypes.Named,
)  # fmt: skip
WORDS = 2
"""A docstring has more than so many beyond the name that it explains."""


@pytest.fixture(scope="module")
def validated(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its parity report, as examples find it."""
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path_factory.mktemp("examples") / "out"))
    return write_parity(copy, validate(copy, lengths=(7,))).path


@pytest.fixture
def folder(native: Path, validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where examples run: `checkpoint/` and `out/`, its bundle, are there."""
    (tmp_path / "checkpoint").symlink_to(native)
    shutil.copytree(validated, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(CONTENDERS, COMPILED)  # it takes its time, and tests of its own


def examples(name: str) -> list[doctest.DocTest]:
    """Those of a public name and of its methods; the package's own are about names that have none."""
    return [each for each in doctest.DocTestFinder().find(getattr(fope_export, name), name, globs={}) if each.examples]


def package_examples() -> list[doctest.DocTest]:
    return [doctest.DocTestParser().get_doctest(fope_export.__doc__ or "", {}, "fope_export", None, None)]


def run(tests: list[doctest.DocTest]) -> None:
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for each in tests:
        runner.run(each, out=told.append)
    assert runner.tries and not runner.failures, "".join(told)


@pytest.mark.parametrize("name", fope_export.__all__)
def test_the_example_of_every_public_name(name: str, folder: None) -> None:
    found = examples(name) or package_examples()
    assert any(re.search(rf"\b{name}\b", example.source + example.want) for each in found for example in each.examples)
    run(found)


def test_an_example_that_is_wrong_fails() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    with pytest.raises(AssertionError, match="Expected"):
        run([wrong])


def methods(owner: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself."""
    for name, value in vars(owner).items():
        value = getattr(value, "__func__", value)
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield f"{owner.__name__}.{name}", value


def explained() -> dict[str, str]:
    """Docstrings of all that people look up, by name."""
    public = {name: getattr(fope_export, name) for name in fope_export.__all__}
    found = public | {each.__name__: each for each in PROTOCOLS}
    for owner in [each for each in found.values() if inspect.isclass(each)]:
        found |= methods(owner)
    own = inspect.getmembers(commands, inspect.isfunction)
    found |= {f"commands.{name}": each for name, each in own if not name.startswith("_")}
    return {name: each.__doc__ or "" for name, each in found.items()}


def test_everything_public_is_explained() -> None:
    known = explained()
    assert len(known) > 80
    words = {name: set(re.findall("[a-z]+", told.lower())) - {*name.lower().split(".")} for name, told in known.items()}
    assert [name for name, more in words.items() if len(more) <= WORDS] == []


@pytest.mark.parametrize("phrase", ["see there", r"see `\w+`\.?\"\"\"", "please report it(?! with)"])
def test_nobody_is_sent_away(phrase: str) -> None:
    sources = {path.name: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert sources and [name for name, text in sources.items() if re.search(phrase, text, re.IGNORECASE)] == []
