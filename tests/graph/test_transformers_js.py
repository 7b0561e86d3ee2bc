"""The bundle where transformers.js looks for it: one more graph on the same weights. What runs it is in test_web.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import nn

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import BundleError, ConfigError
from fope_export.graph.export import export
from fope_export.graph.module import export_module
from fope_export.graph.optimize import optimize
from fope_export.parity.run import validate
from tests.graph.pairs import Pair, pair_inputs
from tests.support import tokens

LAYOUT = ExportConfig(layout="transformers.js")
COPY, WEIGHTS = "onnx/model.onnx", "onnx/model.onnx_data"


@pytest.fixture(scope="module")
def made(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(native, tmp_path_factory.mktemp("layout") / "out", LAYOUT)


@pytest.fixture
def spoilt(made: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may change."""
    return Bundle.open(shutil.copytree(made.path, tmp_path / "bundle"))


def locations(path: Path) -> set[str]:
    """Where an ONNX file has its weights."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def test_the_weights_are_there_once_and_both_graphs_read_them(made: Bundle, bundle: Bundle) -> None:
    assert "model.onnx.data" not in made.manifest.files and {COPY, WEIGHTS} <= made.manifest.files.keys()
    assert (made.path / WEIGHTS).read_bytes() == (bundle.path / "model.onnx.data").read_bytes()
    assert not (made.path / WEIGHTS).is_symlink() and (made.path / WEIGHTS).stat().st_nlink == 1
    assert locations(made.model) == {WEIGHTS} and locations(made.path / COPY) == {"model.onnx_data"}
    for path in (made.model, made.path / COPY):
        onnx.checker.check_model(path, full_check=True)


def test_the_copy_has_the_names_that_it_wants(made: Bundle, bundle: Bundle) -> None:
    copy, portable = (onnx.load(path, load_external_data=False) for path in (made.path / COPY, bundle.model))
    assert copy.graph.node == portable.graph.node and copy.functions == portable.functions
    ports = [[*model.graph.input, *model.graph.output] for model in (copy, portable)]
    names = [[[size.dim_param or size.dim_value for size in v.type.tensor_type.shape.dim] for v in p] for p in ports]
    assert names[0] == [["batch_size" if size == "batch" else size for size in sizes] for sizes in names[1]]
    config = json.loads((made.path / "config.json").read_text())
    assert config.pop("transformers.js_config") == {"dtype": "fp32", "use_external_data_format": True}
    assert config == json.loads((bundle.path / "config.json").read_text())


def test_every_form_of_it_gives_the_same_bits(spoilt: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    plain = optimize(Bundle.open(shutil.copytree(bundle.path, tmp_path / "plain")))
    fast = optimize(spoilt)
    assert locations(fast.path / "model.ort.onnx") == {WEIGHTS}
    for variant in ("portable", "optimized"):
        got, wanted = (
            backend.step(feeds_for(tokens(2, 9)), backend.empty_cache(2))[0]
            for backend in (load_backend(each, variant=variant) for each in (fast, plain))
        )
        np.testing.assert_array_equal(got, wanted)


def test_it_loads_from_behind_links(made: Bundle, tmp_path: Path) -> None:
    (tmp_path / "linked" / "onnx").mkdir(parents=True)
    for name in [*made.manifest.files, "fope_export.json"]:
        (tmp_path / "linked" / name).symlink_to(made.path / name)
    backend = load_backend(Bundle.open(tmp_path / "linked"))
    assert backend.step(feeds_for(tokens(1, 3)), backend.empty_cache(1))[0].shape == (1, 3, 256)


def test_one_takes_the_place_of_another(spoilt: Bundle, native: Path) -> None:
    plain = export(native, spoilt.path)
    assert not (plain.path / "onnx").exists() and (plain.path / "model.onnx.data").exists()
    again = export(native, plain.path, LAYOUT)
    assert (again.path / COPY).exists() and not (again.path / "model.onnx.data").exists()


def test_a_widened_copy_is_what_runtimes_without_bfloat16_get(native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", ExportConfig(layout="transformers.js", dtype="bf16"))
    copy, wide = (onnx.load(made.path / name, load_external_data=False) for name in (COPY, "model.float32.onnx"))
    assert copy.graph.node == wide.graph.node and locations(made.path / "model.float32.onnx") == {WEIGHTS}


def test_it_validates(spoilt: Bundle) -> None:
    outcome = validate(spoilt, lengths=(7, 64))
    assert outcome.passed and all(control.passed for control in outcome.controls)


def node(bundle: Bundle) -> None:
    model = onnx.load(bundle.path / COPY, load_external_data=False)
    next(each for each in model.graph.node if each.op_type == "Sigmoid").op_type = "Tanh"
    onnx.save(model, bundle.path / COPY)


def weight(bundle: Bundle) -> None:
    model = onnx.load(bundle.path / COPY, load_external_data=False)
    one, other = (tensor for tensor in model.graph.initializer if tensor.name.endswith("att_proj.weight.T"))
    one.external_data[1].value, other.external_data[1].value = other.external_data[1].value, one.external_data[1].value
    onnx.save(model, bundle.path / COPY)


@pytest.mark.parametrize("spoil", [node, weight])
def test_a_copy_of_another_model_is_refused(spoil: Callable[[Bundle], None], spoilt: Bundle) -> None:
    spoil(spoilt)
    assert spoilt.damaged() == {COPY: "differs from the hash in the manifest"}
    with pytest.raises(BundleError, match=r"onnx/model\.onnx does not compute what model\.onnx does"):
        validate(spoilt.path, lengths=(7,))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"cache": "static"}, "a static cache"), ({"position_axes": True}, "positions on all axes")],
    ids=str,
)
def test_what_it_does_not_feed_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"transformers.js feeds a growing cache .* {said}"):
        ExportConfig(layout="transformers.js", **options)


def test_a_module_is_none_of_its_models(tmp_path: Path) -> None:
    module: nn.Module = Pair().eval()
    with pytest.raises(ConfigError, match="exported as it is, without layout"):
        export_module(module, pair_inputs(), tmp_path / "out", config=LAYOUT)


def test_the_command_line_has_both(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(native), str(out), "--layout", "transformers.js", "--inline"]) == 0
    assert "inlined, for transformers.js" in capsys.readouterr().out
    assert main(["optimize", str(out)]) == 0
    assert f"stay in {WEIGHTS}" in capsys.readouterr().out
    assert not onnx.load(out / COPY, load_external_data=False).functions
