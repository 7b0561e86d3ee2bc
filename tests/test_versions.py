"""The libraries that are installed, the oldest that are declared among them: what they can run is right, and what they
cannot is refused by name.
"""

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace as Fake

import onnxruntime
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fope_export import errors
from fope_export.backends.choose import choose, load_backend
from fope_export.backends.machine import read_machine
from fope_export.backends.versions import too_old
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.errors import BackendError
from fope_export.generation import generate
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.parity.run import validate
from fope_export.quantizations import CACHES
from fope_export.serving.sampling import SamplingParams

ROOT = Path(__file__).parent.parent
EXTRAS = ("export", "validate", "run")
"""Of which `lowest` has the lowest versions."""
KINDS = {
    "bf16": ExportConfig(dtype="bf16"),
    "int8": ExportConfig(quantize="int8"),
    "opset 24": ExportConfig(opset=24),
    "static": ExportConfig(cache="static", capacity=64),
}


def written(bundle: Bundle, backend: str | None = None) -> list[int]:
    """What a bundle continues with."""
    return [
        token for _, token in generate(load_backend(bundle, backend), [[5, 6, 7]], SamplingParams(max_new_tokens=4))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bundle_runs_or_is_refused_by_name(kind: str, native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", KINDS[kind])
    reason = ""
    try:
        choose(None, read_machine(), made.manifest.export)
    except BackendError as refusal:
        reason = str(refusal)
    if not reason:
        assert len(written(made)) == 4
        return
    for ask in (written, validate):
        with pytest.raises(BackendError, match=r"onnxruntime is [\d.]+, and .* needs [\d.]+: pip install") as caught:
            ask(made)
        assert str(caught.value) == reason


def test_a_rounded_cache_runs_or_is_refused_by_name(native: Path, tmp_path: Path) -> None:
    made = optimize(export(native, tmp_path / "out"), cache=next(iter(CACHES)))
    row = made.manifest.cache_rounding
    if not (reason := too_old("onnxruntime", onnxruntime.__version__, made.manifest.export, row)):
        assert len(written(made)) == 4 and validate(made, lengths=(7,)).passed
        return
    with pytest.raises(
        BackendError, match=r"onnxruntime is [\d.]+, and a cache in .* needs [\d.]+: pip install"
    ) as caught:
        written(made)
    assert str(caught.value) == reason == validate(made, lengths=(7,)).broken


def test_the_portable_and_the_optimized_file_write_what_pytorch_writes(spoilable: Bundle) -> None:
    wanted, portable = written(spoilable, "torch"), written(spoilable)
    made = optimize(spoilable)
    assert portable == written(made) == wanted
    assert validate(made, lengths=(7,)).passed


@pytest.fixture
def declared() -> dict[str, Version]:
    """The lowest version of each package that the extras ask for, but for torch, which has one version here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = map(Requirement, [*project["dependencies"], *(each for name in EXTRAS for each in extras[name])])
    found = {each.name: Version(next(iter(each.specifier)).version) for each in asked if each.specifier}
    assert found.pop("torch")
    return found


def dated(name: str) -> dict[str, Version]:
    """What a set pins for us; what these need in turn is listed below, and pinned too."""
    text = (ROOT / name).read_text()
    assert re.match(r"# The \w+ versions [^:]*, as of \d{4}-\d\d-\d\d: ", text)
    ours, theirs = ([Requirement(line) for line in bare(part)] for part in text.split("# What these depend on:\n"))
    assert all(str(each.specifier).startswith("==") for each in (*ours, *theirs)) and theirs
    return {each.name: Version(next(iter(each.specifier)).version) for each in ours}


def bare(text: str) -> list[str]:
    """Lines, without comments."""
    return [told for line in text.splitlines() if (told := line.partition("#")[0].strip())]


def test_the_lowest_that_are_tried_are_those_that_are_declared(declared: dict[str, Version]) -> None:
    assert dated("constraints-lowest.txt") == declared


def test_the_newest_that_are_tried_are_of_all_that_is_declared(declared: dict[str, Version]) -> None:
    newest = dated("constraints-newest.txt")
    assert newest.keys() == declared.keys() and all(newest[name] >= lowest for name, lowest in declared.items())
    usual = {each.name: each for each in map(Requirement, bare((ROOT / "constraints.txt").read_text()))}
    names: dict[str, Requirement] = {canonicalize_name(name): each for name, each in usual.items()}
    assert all(newest[name] >= Version(next(iter(names[name].specifier)).version) for name in newest)


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'fope-export[run]'"),
        ({"url": "file:///a%20b", "dir_info": {}}, "pip install '/a b[run]'"),
        ({"url": "file:///clone", "dir_info": {"editable": True}}, "pip install -e '/clone[run]'"),
        (
            {"url": "https://host/repo", "vcs_info": {"vcs": "git", "commit_id": "c0"}},
            "pip install 'fope-export[run] @ git+https://host/repo@c0'",
        ),
        ({"url": "file:///a.whl", "archive_info": {}}, "pip install 'fope-export[run] @ file:///a.whl'"),
    ],
    ids=["unknown", "folder", "editable", "git", "wheel"],
)
def test_a_hint_installs_from_where_this_came_from(
    origin: object, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [Fake(read_text=lambda name: json.dumps(origin) if origin else None)]
    monkeypatch.setattr(errors, "distributions", lambda name: written)
    assert errors.install("run") == command
    assert errors.install("run", upgrade=True) == command.replace("install", "install -U", 1)
    assert errors.missing("x", "run").hint == command
