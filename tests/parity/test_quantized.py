"""The yardstick for quantized bundles: a graph that is wrong still fails and is told where, and the cost is bounded."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console

from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph import calibration
from fope_export.graph.export import export
from fope_export.graph.quantize import EXACT, OPERATOR
from fope_export.model.checkpoint import source_of
from fope_export.parity import quantized
from fope_export.parity.quantized import SCORED, allowance_of, cost_of
from fope_export.parity.run import validate
from fope_export.quantizations import QUANTIZATIONS
from fope_export.report import parity_page, place, print_parity, write_parity
from fope_export.shipped import shipped
from tests.conftest import small_decoder, write_native
from tests.spoiling import attributes, weights


@pytest.fixture(scope="module")
def made(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(native, tmp_path_factory.mktemp("int4") / "out", ExportConfig(quantize="int4", rounding="nearest"))


@pytest.fixture
def spoilable(made: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(made.path, tmp_path / "bundle"))


@pytest.mark.parametrize(("inputs", "block"), [(384, 32), (384, 128), (3072, 32), (3072, 256)])
def test_more_error_is_allowed_where_the_operator_adds_without_blocks(made: Bundle, inputs: int, block: int) -> None:
    """Its error is as much larger than PyTorch's as the allowance says: no factor without a reason."""
    model = torch.nn.Sequential(torch.nn.Linear(inputs, 512, bias=False))
    allowed = allowance_of(made, model)
    assert allowed == pytest.approx((inputs / 384) ** 0.5)
    rng, blocks = np.random.default_rng(0), inputs // block
    x = rng.standard_normal((16, inputs), np.float32)
    integers = rng.integers(0, 256, (512, blocks, block // 2), np.uint8)
    scales = rng.uniform(0.01, 0.03, (512, blocks)).astype(np.float32)
    sizes: dict[str, Any] = {"K": inputs, "N": 512, "bits": 4, "block_size": block, "accuracy_level": EXACT}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(OPERATOR, ["x", "integers", "scales"], ["y"], domain="com.microsoft", **sizes)],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (16, 512))],
        [onnx.numpy_helper.from_array(integers, "integers"), onnx.numpy_helper.from_array(scales, "scales")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    content = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    levels = np.stack([integers & 15, integers >> 4], axis=-1).reshape(512, blocks, block).astype(np.float64)
    weight = ((levels - 8) * scales[..., None]).reshape(512, inputs)
    truth = x.astype(np.float64) @ weight.T
    products = session.run(None, {"x": x})[0], (torch.from_numpy(x) @ torch.from_numpy(weight).float().T).numpy()
    errors = [np.linalg.norm(got - truth) for got in products]
    assert errors[0] / errors[1] < 1.5 * allowed
    if allowed > 2:
        assert errors[0] / errors[1] > 1.5  # where a newer operator adds in blocks, the allowance has to go


def test_no_more_error_is_allowed_elsewhere(made: Bundle) -> None:
    wide, narrow = (torch.nn.Sequential(torch.nn.Linear(inputs, 8)) for inputs in (4096, 64))
    assert allowance_of(made, narrow) == 1 < allowance_of(made, wide)
    plain = msgspec.structs.replace(made.manifest.export, block=None, rounding=None)
    for change in ({"quantize": None}, {"quantize": "int8-qdq"}, {"dtype": "fp16"}):
        export = msgspec.structs.replace(plain, **change)
        exported: Any = SimpleNamespace(manifest=SimpleNamespace(export=export))
        assert allowance_of(exported, wide) == 1


SPOILED: dict[str, tuple[Callable[[Bundle], None], str, str]] = {
    "padding": (attributes("sin_pad", 0.0, 1), "layers.1.attention.rotary", ""),
    "integers": (
        weights("layers.1.feed_forward.ff_out.weight.int4", lambda a: a[::-1].copy()), "",
        "layers.1.feed_forward.ff_out.weight",
    ),
    "one integer": (weights("layers.0.attention.att_proj.weight.int4", lambda a: a ^ (np.indices(a.shape).sum(0) == 0)),
        "", "layers.0.attention.att_proj.weight"),
    "scales": (weights("lm_head.weight.scales", lambda a: a * 1.5), "", "lm_head.weight"),
    "norm": (weights("norm.weight", lambda a: a + 0.1), "norm", "norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_bundle_fails_and_the_layer_is_named_without_the_hash(name: str, spoilable: Bundle) -> None:
    spoil, module, tensor = SPOILED[name]
    spoil(spoilable)
    result = validate(spoilable, lengths=(7, 64))
    assert result.place is not None and result.cost is not None
    assert (result.place.divergence.module if result.place.divergence else "") == module
    assert result.place.tensors == ((tensor,) if tensor else ())
    others = all(case.verdict.passed for case in result.cases) and not result.cost.failed
    assert not result.passed and not others and (module or tensor) in place(result)


@pytest.fixture(scope="module")
def compensated(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(native, tmp_path_factory.mktemp("compensated") / "out", ExportConfig(quantize="int4"))


def two_steps(integers: np.ndarray) -> np.ndarray:
    """The first one two steps further: one step could be another right rounding."""
    integers = integers.copy()
    integers[0, 0, 0] ^= 2
    return integers


COMPENSATED = SPOILED | {
    "one integer": (weights("layers.0.attention.att_proj.weight.int4", two_steps), "",
        "layers.0.attention.att_proj.weight"),
    "zeros": (weights("layers.0.feed_forward.ff_out.weight.zero_points", lambda a: a ^ 2), "",
        "layers.0.feed_forward.ff_out.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPENSATED)
def test_a_spoiled_bundle_whose_weights_are_compensated_fails_too(
    name: str, compensated: Bundle, tmp_path: Path
) -> None:
    spoil, module, tensor = COMPENSATED[name]
    spoil(spoilt := Bundle.open(shutil.copytree(compensated.path, tmp_path / "bundle")))
    result = validate(spoilt, lengths=(7, 64))
    assert result.place is not None and (result.place.divergence is not None) == bool(module)
    assert not result.passed and result.place.tensors == ((tensor,) if tensor else ())


def test_compensated_weights_are_no_rounding_to_the_nearest(compensated: Bundle, native: Path) -> None:
    """A bundle that says it was rounded so is held to it."""
    export = msgspec.structs.replace(compensated.manifest.export, rounding="nearest")
    said = replace(compensated, manifest=msgspec.structs.replace(compensated.manifest, export=export))
    cost = cost_of(said, source_of(compensated).model, load_backend(compensated))
    assert (
        "lm_head.weight" in cost.strays
        and not cost_of(compensated, source_of(compensated).model, load_backend(compensated)).strays
    )


@pytest.fixture(scope="module")
def rounded(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "SAMPLED", 1 << 9)
        return export(native, tmp_path_factory.mktemp("qdq") / "out", ExportConfig(quantize="int8-qdq"))


ROUNDED = SPOILED | {
    "integers": (
        weights("layers.1.feed_forward.ff_out.weight.int8", lambda a: a[::-1].copy()), "",
        "layers.1.feed_forward.ff_out.weight",
    ),
    "one integer": (
        weights("layers.0.attention.att_proj.weight.int8", lambda a: a ^ (np.indices(a.shape).sum(0) == 0)), "",
        "layers.0.attention.att_proj.weight",
    ),
    "scales": (weights("layers.0.feed_forward.ff_proj.weight.scale", lambda a: a[::-1].copy()), "",
        "layers.0.feed_forward.ff_proj.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_a_spoiled_bundle_that_rounds_inputs_fails_too(name: str, rounded: Bundle, tmp_path: Path) -> None:
    spoil, module, tensor = ROUNDED[name]
    spoil(spoilt := Bundle.open(shutil.copytree(rounded.path, tmp_path / "bundle")))
    result = validate(spoilt, lengths=(7, 64))
    assert result.place is not None and result.cost is not None
    assert (result.place.divergence.module if result.place.divergence else "") == module
    assert result.place.tensors == ((tensor,) if tensor else ())
    assert not all(case.verdict.passed for case in result.cases) or result.cost.failed


def test_inputs_rounded_by_another_scale_than_they_are_restored_by(rounded: Bundle, tmp_path: Path) -> None:
    spoilt = Bundle.open(shutil.copytree(rounded.path, tmp_path / "bundle"))
    model = onnx.load(spoilt.model, load_external_data=False)
    node = next(n for n in model.graph.node if n.name == "layers.0.attention.attn_out/DequantizeLinear")
    node.input[1] = "layers.1.feed_forward.ff_out.input_scale"
    onnx.save(model, spoilt.model)
    result = validate(spoilt, lengths=(64,))
    assert not result.passed and result.place and result.place.divergence
    assert result.place.divergence.module == "layers.0.attention.attn_out"


def test_a_scale_that_clips_costs_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "SCORED", 1 << 12)
    made = export(shipped("fope"), tmp_path / "out", ExportConfig(quantize="int8-qdq"))
    model = source_of(made).model
    cost = cost_of(made, model, load_backend(made))
    allowed = QUANTIZATIONS["int8-qdq"].growth
    assert not cost.failed and cost.growth and allowed and 0 < cost.growth < allowed
    weights("layers.2.feed_forward.ff_out.input_scale", lambda a: a / 32)(made)
    spoilt = cost_of(made, model, load_backend(made))
    assert "perplexity grows by" in spoilt.failed[0] and not spoilt.strays


def test_the_cost_is_in_every_report(made: Bundle, spoilable: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    row = QUANTIZATIONS["int4"]
    for limit, verdict in ((row.growth, "pass"), (-1.0, "FAIL")):
        monkeypatch.setitem(QUANTIZATIONS, "int4", replace(row, growth=limit))
        result = validate(made, lengths=(64,))
        assert result.passed == (verdict == "pass") and result.cost is not None
        assert result.cost.tokens == SCORED and result.cost.perplexity and result.cost.quantized and result.cost.kl > 0
        write_parity(spoilable, result)
        record = json.loads((spoilable.path / "reports/parity.json").read_text())["quantization"]
        assert record["limit"] == limit and record["passed"] == result.passed
        assert record["growth"] == pytest.approx(result.cost.quantized / result.cost.perplexity - 1)
        suite = ElementTree.parse(spoilable.path / "reports/parity.xml").getroot()
        case = next(case for case in suite if case.get("name") == "quantization: int4")
        assert (case.find("failure") is None) == result.passed
        assert ("perplexity grows by" in parity_page(made, result)) != result.passed
        written = io.StringIO()
        print_parity(result, Console(width=250, file=written))
        line = next(line for line in written.getvalue().splitlines() if line.startswith("int4 weights: perplexity"))
        assert verdict in line and "16,384 bytes of held-out Python" in line


def test_without_bytes_only_the_divergence_is_known(tmp_path: Path) -> None:
    checkpoint = write_native(small_decoder(vocab_size=300), tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    made = export(checkpoint, tmp_path / "out", ExportConfig(quantize="int8"))
    result = validate(made, lengths=(64,))
    assert result.passed and result.cost is not None and result.cost.growth is None and 0 < result.cost.kl < 1e-2
    assert "2,048 random tokens" in parity_page(made, result)


def test_a_layer_that_the_checkpoint_lacks_is_named(spoilable: Bundle) -> None:
    model = onnx.load(spoilable.model, load_external_data=False)
    node = next(node for node in model.graph.node if node.name == "lm_head/MatMulNBits")
    node.name = "head/MatMulNBits"
    onnx.save(model, spoilable.model)
    result = validate(spoilable, lengths=(7,))
    assert not result.passed and "quantizes head, which is no linear layer" in result.broken


@pytest.mark.parametrize(("kind", "scored"), [("int4", SCORED), ("int8", 1 << 12)])
def test_the_shipped_model_hardly_suffers(
    kind: str, scored: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "SCORED", scored)
    made = export(shipped("fope"), tmp_path / "out", ExportConfig(quantize=kind))
    cost = cost_of(made, source_of(made).model, load_backend(made))
    assert cost.growth is not None and not cost.failed
    assert -0.001 < cost.growth <= QUANTIZATIONS[kind].growth and cost.kl < {"int4": 0.03, "int8": 3e-4}[kind]
    sizes = [path.stat().st_size for path in (made.path / "model.onnx.data", shipped("fope") / "model.safetensors")]
    assert 0 < sizes[0] < sizes[1] * {"int4": 0.4, "int8": 0.65}[kind]
