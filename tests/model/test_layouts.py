"""The table of layouts: a row more goes through every command, and nothing but the table knows a row's name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

import fope_export
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.model.layouts import LAYOUTS, native
from tests.model import toy_layout

PACKAGE = Path(fope_export.__file__).parent
ROOT = PACKAGE.parent
TABLE = "fope_export.model.layouts"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def toy(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in a layout that one file and one row were added for."""
    monkeypatch.setitem(LAYOUTS, "toy", toy_layout.__name__)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    state, names = decoder.state_dict(), native.stored_names(decoder.config)
    save_file({name.upper(): state[name].clone() for name in names}, folder / toy_layout.WEIGHTS)
    (folder / toy_layout.CONFIGURATION).write_bytes(msgspec.json.encode(decoder.config))
    return folder


def test_a_row_more_goes_through_every_command(toy: Path, bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["inspect", str(toy)]) == 0
    assert re.search(r"layout +toy\b", capsys.readouterr().out)
    assert main(["export", str(toy), str(out)]) == 0
    assert main(["optimize", str(out)]) == 0
    assert main(["validate", str(out), "--lengths", "1,64"]) == 0
    assert main(["run", str(out), "--prompt-ids", "7,8,9", "--max-new-tokens", "4"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert f"{toy} (toy)" in "".join(capsys.readouterr().out.split("\n"))
    assert (out / "model.onnx").read_bytes() == bundle.model.read_bytes()
    assert {toy_layout.CONFIGURATION, toy_layout.WEIGHTS} == set(Bundle.open(out).manifest.source.files)


def test_a_row_more_is_asked_about_and_refused(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["export", "--help"])
    assert "hugging_face, toy)" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"; toy: {toy_layout.CONFIGURATION}." in capsys.readouterr().err
    weights = toy / toy_layout.WEIGHTS
    tensors = load_file(weights)
    tensors.pop("NORM.WEIGHT")
    save_file(tensors, weights)
    assert main(["inspect", str(toy)]) == 2
    assert "1 tensors missing: NORM.WEIGHT" in capsys.readouterr().err
    weights.unlink()
    assert main(["inspect", str(toy)]) == 2
    assert f"The folder looks like layout toy ({toy_layout.CONFIGURATION})." in capsys.readouterr().err


def strings(path: Path) -> Iterator[str]:
    """What a module's code says, without what its documentation says."""
    tree = ast.parse(path.read_text())
    documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            yield node.value


def naming(path: Path) -> set[str]:
    """The layouts that a module knows by name."""
    return {name for text in strings(path) for name in LAYOUTS if re.search(rf"\b{name}\b", text)}


def test_no_other_file_knows_a_layouts_name() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    known = {module.removesuffix(".__init__"): naming(path) for module, path in modules.items()}
    assert known.pop(TABLE) == {*LAYOUTS}
    for name, module in LAYOUTS.items():
        known[module] -= {name}  # a model_type of config.json may be called the same
    assert not {module: names for module, names in known.items() if names}


def test_the_documentation_names_every_layout() -> None:
    _, _, works = (ROOT / "docs/support.md").read_text().partition("| checkpoints |")
    assert {name for name in LAYOUTS if f"`{name}`" in works.partition("| spectra |")[0]} == {*LAYOUTS}


def test_the_former_name_of_a_checkpoints_layout_works_for_a_version(olmo_fope: Path) -> None:
    with pytest.warns(DeprecationWarning, match="is called layout"):
        assert load_checkpoint(olmo_fope).dialect == "olmo"
