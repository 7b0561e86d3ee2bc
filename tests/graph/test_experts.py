"""Mixtures in the optimized file: the portable file's numbers and bytes, and what it could get wrong is noticed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import make_node
from safetensors.torch import load_file

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import Settings, load_backend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph.export import export, to_onnx
from fope_export.graph.optimize import optimize
from fope_export.manifest import OPTIMIZED
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.model.experts import Experts
from fope_export.parity.run import validate
from fope_export.parity.stages import validate_stages
from tests.conftest import mixture, small_decoder, write_native
from tests.support import same_function, truth_of

SCOPE = "layers.1.feed_forward"
WAYS = [(None, "fp16", 64), (None, "bf16", 64), ("int4", "fp32", 64), ("int4", "fp16", 96), ("int8", "fp32", 64)]
"""Quantization, dtype and inner width; 96 of 4 bits go in blocks of 16 inputs."""


def made(folder: Path, model: Decoder, quantize: str | None = None, dtype: str = "fp32") -> Bundle:
    config = ExportConfig(quantize=quantize, dtype=dtype, block=32 if quantize else None)
    return optimize(export(write_native(model, folder / "in"), folder / "out", config))


def graph_of(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(bundle.path / OPTIMIZED, load_external_data=False).graph


@pytest.mark.parametrize(("quantize", "dtype", "width"), WAYS)
def test_they_pass_in_both_files(quantize: str | None, dtype: str, width: int, tmp_path: Path) -> None:
    model = small_decoder(experts=mixture(groups=2, intermediate_size=width))
    bundle = made(tmp_path, model, quantize, dtype)
    result = validate(bundle, lengths=(64,))
    assert result.passed, result.failures
    kinds = [node.op_type for node in graph_of(bundle).node if node.name.startswith(SCOPE)]
    assert kinds.count("QMoE" if quantize else "MoE") == 1 and "DequantizeLinear" not in kinds
    if quantize:
        assert result.cost and result.cost.growth is not None and not result.cost.strays
    assert quantize != "int8" or validate_stages(bundle).passed


@pytest.mark.parametrize("quantize", [None, "int4", "int8"])
def test_both_files_read_the_same_bytes(quantize: str | None, tmp_path: Path) -> None:
    bundle = made(tmp_path, small_decoder(experts=mixture(count=32)), quantize)
    tensors = {tensor.name: tensor for tensor in graph_of(bundle).initializer}
    (node,) = (node for node in graph_of(bundle).node if node.op_type in ("MoE", "QMoE"))
    read = [tensors[name] for name in node.input[2:] if name]
    assert len(read) == (6 if quantize else 2)
    for tensor in read:
        assert {entry.key: entry.value for entry in tensor.external_data}["location"] == "model.onnx.data"
    if quantize:
        assert [list(tensor.dims) for tensor in read[:2]] == [[32, 128, 32 if quantize == "int4" else 64], [32, 128, 2]]


def test_activations_stay_as_they_are_where_that_is_asked(tmp_path: Path) -> None:
    checkpoint = write_native(small_decoder(experts=mixture()), tmp_path / "in")
    bundle = export(checkpoint, tmp_path / "out", ExportConfig(quantize="int8"))
    exact = optimize(bundle, int8_activations=False)
    kinds = [node.op_type for node in graph_of(exact).node]
    assert kinds.count("MoE") == 1 and kinds.count("DequantizeLinear") == 2
    ids = np.arange(1, 40)[None]
    got, wanted = (load_backend(exact, settings=Settings(optimized=each)) for each in (True, False))
    logits = [backend.step(feeds_for(ids), backend.empty_cache(1))[0] for backend in (got, wanted)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[1]).max()


@pytest.mark.parametrize(("width", "block"), [(64, 32), (96, 16), (24, 0)])
def test_the_largest_block_that_divides_is_taken(width: int, block: int) -> None:
    """Experts of which none does stay as they are."""
    config = ExportConfig(quantize="int4", rounding="nearest").resolved(64)
    graph = to_onnx(small_decoder(experts=mixture(intermediate_size=width)), config).graph
    blocks = [node.attributes["block_size"].value for node in graph if node.op_type == "DequantizeLinear"]
    assert blocks == [block] * 2 if block else not blocks


def tied() -> Decoder:
    """A router to which all experts are alike, and they are not."""
    model = small_decoder(experts=mixture())
    experts = model.get_submodule(SCOPE)
    assert isinstance(experts, Experts)
    torch.nn.init.zeros_(experts.router.weight)
    return model


def test_ties_fall_as_in_the_portable_file(tmp_path: Path) -> None:
    """Which takes the first of equals, while the operator takes the last; PyTorch says nothing of its own."""
    bundle, ids = made(tmp_path, tied()), np.arange(1, 40)[None]
    backends = [load_backend(bundle, settings=Settings(optimized=each)) for each in (True, False)]
    got, wanted = (backend.step(feeds_for(ids), backend.empty_cache(1))[0] for backend in backends)
    first = load_checkpoint(tmp_path / "in").model
    experts = first.get_submodule(SCOPE)
    assert isinstance(experts, Experts)
    experts.route = lambda tokens: (torch.arange(8) < 4).to(tokens.dtype).expand(len(tokens), -1) / 4  # type: ignore[method-assign]
    same_function(got, wanted, truth_of(first, ids))
    edit(bundle, last_of_equals)
    wrong = load_backend(bundle)
    assert np.abs(wrong.step(feeds_for(ids), wrong.empty_cache(1))[0] - wanted).max() > 1e-2


def edit(bundle: Bundle, change: Callable[[onnx.GraphProto, onnx.NodeProto], None]) -> None:
    path = bundle.path / OPTIMIZED
    model = onnx.load(path, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.op_type in ("MoE", "QMoE"))
    change(model.graph, node)
    onnx.save(model, path)


def last_of_equals(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """The operator chooses by itself."""
    node.input[1] = f"{SCOPE}.router/Gemm"
    next(each for each in node.attribute if each.name == "normalize_routing_weights").i = 1


def in_halves(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Rows of gate, then rows of up."""
    rows = onnx.numpy_helper.from_array(np.r_[0:128:2, 1:128:2], "rows")
    graph.initializer.append(rows)
    position = list(graph.node).index(node)
    graph.node.insert(position, make_node("Gather", [node.input[2], "rows"], ["halves"], axis=1))
    node.input[2] = "halves"


def not_normalized(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Multiplied by the sum of the weights before they were divided by it."""
    makers = {name: each for each in graph.node for name in each.output}
    makers[f"{SCOPE}/ReduceSum.weights"].input[0] = makers[f"{SCOPE}/Div"].input[0]


def one_too_few(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    next(each for each in node.attribute if each.name == "k").i = 3


@pytest.mark.parametrize(
    ("mistake", "quantize"),
    [(in_halves, None), (not_normalized, None), (not_normalized, "int8"), (one_too_few, "int8")],
)
def test_a_mistake_is_refused(mistake: Callable[..., None], quantize: str | None, tmp_path: Path) -> None:
    bundle = made(tmp_path, small_decoder(experts=mixture()), quantize)
    edit(bundle, mistake)
    result = validate(bundle, lengths=(64,))
    failed = [case.name for case in result.cases if not case.verdict.passed]
    assert failed and all(name.endswith(", optimized") for name in failed)


def test_a_native_checkpoint_has_them_the_other_way_round(tmp_path: Path) -> None:
    model = small_decoder(experts=mixture(intermediate_size=48))
    stored = load_file(write_native(model, tmp_path / "in") / "model.safetensors")
    proj, out = stored[f"{SCOPE}.proj"], stored[f"{SCOPE}.out"]
    assert proj.shape == (8, 64, 96) and out.shape == (8, 48, 64)
    experts = model.get_submodule(SCOPE)
    assert isinstance(experts, Experts)
    np.testing.assert_array_equal(proj[..., :48].transpose(1, 2), experts.proj[:, 1::2])  # up
    again = load_checkpoint(tmp_path / "in").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
