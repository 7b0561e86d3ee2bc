"""Several axes of positions, a phase per pair and positions in between: right exports pass, planted mistakes do not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import Settings, load_backend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.errors import BackendError, ConfigError, ExportError, ParityError
from fope_export.fope import contract
from fope_export.fope.rotary import FopeRotary
from fope_export.graph.export import export
from fope_export.graph.module import export_module
from fope_export.graph.optimize import optimize
from fope_export.manifest import OPTIMIZED
from fope_export.model.checkpoint import load_checkpoint
from fope_export.parity.controls import AXES, FOLDED, PHASES, ROUNDED
from fope_export.parity.localize import different_rotations
from fope_export.parity.module import validate_module
from fope_export.parity.results import ParityResult
from fope_export.parity.run import validate
from fope_export.parity.stages import validate_stages
from tests.conftest import small_decoder, write_native
from tests.extensions import extended, extended_decoder, seen, truth_at
from tests.support import same_function, tokens

SHORT = (7,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three axes, and coefficients over both bases."""
    return write_native(extended_decoder(axes=3, bases=2), tmp_path_factory.mktemp("extended") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With its optimized file."""
    folder = tmp_path_factory.mktemp("extended") / "out"
    return optimize(export(checkpoint, folder, ExportConfig(position_axes=True)))


@pytest.fixture
def spoilt(exported: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported.path, tmp_path / "out"))


def graph_of(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.model)


def calls(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == contract.DOMAIN]


def test_the_graph_takes_positions_on_all_axes(exported: Bundle) -> None:
    ports = {port.name: port for port in exported.manifest.inputs}
    assert (ports["position_ids"].dtype, ports["position_ids"].shape) == ("int64", [3, "batch", "sequence"])
    assert ports["input_ids"].shape == ["batch", "sequence"]
    assert exported.manifest.decoder().spectrum.axes == 3
    assert "positions on all axes" in exported.manifest.export.described
    assert "genai_config.json" not in exported.manifest.files  # it feeds one position
    model = graph_of(exported)
    assert {x.domain: x.version for x in model.opset_import}[contract.DOMAIN] == contract.GENERAL
    told = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in calls(model)]
    assert [each["plugin_version"] for each in told] == [b"2", b"2"]


def test_a_right_export_passes_and_its_mistakes_are_refused(exported: Bundle) -> None:
    result = validate(exported, lengths=SHORT)
    assert result.passed, result.failures
    controls = {control.name: control for control in result.controls}
    assert {AXES.name, PHASES.name} <= controls.keys()
    assert all(not control.skipped for control in controls.values())
    assert any("an image in it" in case.name for case in result.cases)


def test_every_form_of_it_passes(tmp_path: Path) -> None:
    """In half precision, folded, in a static cache, with rounded layers."""
    model = extended_decoder(axes=3, bases=2, kv_heads=2)
    config = ExportConfig(
        dtype="fp16", cache="static", capacity=200, fold_padding=True, position_axes=True, quantize="int8-qdq"
    )
    result = validate(export(write_native(model, tmp_path / "checkpoint"), tmp_path / "out", config), lengths=SHORT)
    assert result.passed, result.failures
    assert {AXES.name, FOLDED.name} <= {control.name for control in result.controls}


@pytest.mark.parametrize("optimized", [True, False])
def test_one_position_stands_on_every_axis(exported: Bundle, optimized: bool) -> None:
    backend, feeds = load_backend(exported, settings=Settings(optimized=optimized)), feeds_for(tokens(2, 20))
    everywhere = feeds._replace(position_ids=np.repeat(feeds.position_ids[..., None], 3, axis=-1))
    one, all_ = (backend.step(each, backend.empty_cache(2))[0] for each in (feeds, everywhere))
    np.testing.assert_array_equal(one, all_)


def test_both_files_follow_every_axis(exported: Bundle, checkpoint: Path) -> None:
    model, feeds = load_checkpoint(checkpoint).model, seen(feeds_for(tokens(2, 30)), 3)
    truth = truth_at(model, feeds).numpy()
    got = []
    for optimized in (True, False):
        backend = load_backend(exported, settings=Settings(optimized=optimized))
        got.append(backend.step(feeds, backend.empty_cache(2))[0])
    same_function(got[0], got[1], truth)
    assert abs(truth - truth_at(model, feeds_for(tokens(2, 30))).numpy()).max() > 1e-3


def test_text_alone_is_as_simple_as_without_axes(tmp_path: Path) -> None:
    """The same graphs, but for what they say of the spectrum and of each other."""
    made = []
    for name, model in (("plain", small_decoder()), ("axes", extended_decoder(axes=3))):
        bundle = optimize(export(write_native(model, tmp_path / name), tmp_path / f"{name}-out"))
        graphs = [onnx.load(path) for path in (bundle.model, bundle.path / OPTIMIZED)]
        for graph in graphs:
            del graph.metadata_props[:]
        made.append([graph.SerializeToString(deterministic=True) for graph in graphs])
    assert made[0] == made[1]


def swap_axes(model: onnx.ModelProto) -> None:
    for tensor in axes_in(model):
        axis = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((axis + 1) % (axis.max() + 1), tensor.name))


def drop_phases(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith("sin_coef"):
            coef = numpy_helper.to_array(tensor).copy()
            coef[:, coef.shape[1] // 2 :] = 0
            tensor.CopyFrom(numpy_helper.from_array(coef, tensor.name))


def round_positions(model: onnx.ModelProto) -> None:
    """Those of every call that are fractions."""
    floats = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    for node in calls(model):
        if node.input[2] in floats:
            model.graph.node.insert(0, helper.make_node("Round", [node.input[2]], ["rounded"], name="spoilt/Round"))
            node.input[2] = "rounded"


def flip_sign(model: onnx.ModelProto) -> None:
    """Of the second call."""
    sign = next(each for each in calls(model)[1].attribute if each.name == "sign")
    sign.f = -sign.f


def axes_in(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    named = {node.input[6] for node in calls(model)}
    return [t for t in model.graph.initializer if t.name in named and numpy_helper.to_array(t).any()]


def after(bundle: Bundle, spoil: Callable[[onnx.ModelProto], None]) -> None:
    model = graph_of(bundle)
    before = model.SerializeToString()
    spoil(model)
    assert model.SerializeToString() != before
    onnx.save(model, bundle.model)


def test_swapped_axes_are_refused_and_found(spoilt: Bundle) -> None:
    after(spoilt, swap_axes)
    result = validate(spoilt, lengths=SHORT)
    assert not result.passed and result.place
    assert result.place.rotations == ("layers.0.attention.rotary", "layers.1.attention.rotary")
    wrong = [case.name for case in result.cases if not case.verdict.passed]
    assert wrong and all("an image in it" in name for name in wrong)  # where axes are equal, they may be swapped


def test_dropped_phases_are_refused_and_found(spoilt: Bundle) -> None:
    after(spoilt, drop_phases)
    result = validate(spoilt, lengths=SHORT)
    assert not result.passed and result.place
    assert set(result.place.tensors) == {f"layers.{i}.attention.rotary.sin_coef" for i in range(2)}


def test_layer_by_layer_too(exported: Bundle, spoilt: Bundle) -> None:
    result = validate_stages(exported)
    assert result.passed, result.failures
    after(spoilt, swap_axes)
    failed = [stage.name for stage in validate_stages(spoilt).stages if stage.own.failed]
    assert failed == ["layers.0", "layers.1"]


class Pair(nn.Module):
    """Text, plain; and an image, on two axes at positions in between, with phases."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = [FopeRotary.create(head_dim=16, groups=2, training_length=64, generator=generator) for _ in range(2)]
        self.text, self.image = made[0], FopeRotary.from_spectrum(extended(made[1].spectrum, axes=2, bases=2))

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = self.image(*self.text(q, k, position_ids), places)
        return turned


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Bundle]:
    torch.manual_seed(0)
    module, length, ids = Pair().eval(), {1: Dim("sequence")}, torch.arange(9).expand(2, 9).contiguous()
    example = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16), ids, 20 * torch.rand(2, 2, 9)
    sizes = length, length, length, {2: length[1]}
    return module, export_module(module, example, tmp_path_factory.mktemp("pair") / "out", dynamic_shapes=sizes)


def test_a_module_may_have_plain_and_extended_rotations(pair: tuple[Pair, Bundle]) -> None:
    """Its calls are all general then, for a graph has one version of an operator."""
    module, bundle = pair
    ports = {port.name: (port.dtype, port.shape) for port in bundle.manifest.inputs}
    assert ports["places"] == ("float", [2, 2, "sequence"])
    assert ports["position_ids"] == ("int64", [2, "sequence"])
    assert {len(node.input) for node in calls(graph_of(bundle))} == {len(contract.INPUTS[contract.GENERAL])}
    result = validate_module(bundle, module)
    assert result.passed, result.failures
    controls = {control.name: control.skipped for control in result.controls}
    assert {AXES.name, PHASES.name, ROUNDED.name} <= controls.keys() and not any(controls.values())


def spoilt_module(pair: tuple[Pair, Bundle], folder: Path, spoil: Callable[[onnx.ModelProto], None]) -> ParityResult:
    bundle = Bundle.open(shutil.copytree(pair[1].path, folder / "out"))
    after(bundle, spoil)
    return validate_module(bundle, pair[0])


@pytest.mark.parametrize("spoil", [swap_axes, drop_phases, round_positions])
def test_a_modules_planted_mistakes_are_refused(
    pair: tuple[Pair, Bundle], tmp_path: Path, spoil: Callable[[onnx.ModelProto], None]
) -> None:
    result = spoilt_module(pair, tmp_path, spoil)
    assert not result.passed
    assert any(not case.verdict.passed for case in result.cases)
    if spoil is swap_axes:
        assert result.place and result.place.rotations == ("image",)


class Whole(nn.Module):
    """One rotation, plain."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = FopeRotary.create(head_dim=16, groups=1, training_length=64)

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = self.rotary(q, k, position_ids=position_ids)
        return turned


def test_a_module_at_whole_positions_rounds_none(tmp_path: Path) -> None:
    """So that nobody can be asked to refuse it."""
    module = Whole().eval()
    example = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16), torch.arange(5)[None].float()
    bundle = export_module(module, example, tmp_path / "out")
    result = validate_module(bundle, module, [example])
    assert result.passed, result.failures
    assert not {AXES.name, PHASES.name, ROUNDED.name} & {control.name for control in result.controls}


def test_text_alone_is_never_said_to_have_other_axes(checkpoint: Path, tmp_path: Path) -> None:
    """Its calls are general for their phases' sake, and have one position."""
    bundle, model = export(checkpoint, tmp_path / "out"), load_checkpoint(checkpoint).model
    assert different_rotations(bundle, model) == []
    after(bundle, flip_sign)
    assert different_rotations(bundle, model) == ["layers.1.attention.rotary"]


def test_positions_in_float64_are_refused(tmp_path: Path) -> None:
    example = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16), torch.arange(5)[None].double()
    with pytest.raises(ExportError, match="a rotation's positions are float64"):
        export_module(Whole().eval(), example, tmp_path / "out")


def test_what_cannot_be_is_refused(native: Path, bundle: Bundle, exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="position_axes: the model's tokens have one position each"):
        export(native, tmp_path / "out", ExportConfig(position_axes=True))
    assert not (tmp_path / "out").exists()
    feeds = feeds_for(tokens(1, 5))
    for given, axes in ((bundle, 3), (exported, 2)):
        backend = load_backend(given)
        several = np.zeros((1, 5, axes), np.int64)
        with pytest.raises(BackendError, match=f"tokens have positions on {axes} axes, and the graph takes [13]"):
            backend.step(feeds._replace(position_ids=several), backend.empty_cache(1))
    with pytest.raises(ParityError, match="positions on several axes are neither saved nor loaded"):
        validate(exported, save=tmp_path / "inputs.json")
    model = load_checkpoint(native).model
    with pytest.raises(ConfigError, match=r"position_ids is torch\.float32, and a decoder's tokens are counted"):
        model(*(torch.from_numpy(x) for x in feeds[:2]), torch.zeros(1, 5), model.empty_cache(1))
