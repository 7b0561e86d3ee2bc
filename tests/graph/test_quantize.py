"""Quantized weights: which they are, what their integers stand for, and the same bytes every time."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_ir.passes import PreconditionError

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig, convert
from fope_export.errors import ConfigError
from fope_export.fope import contract
from fope_export.graph.builder import MICROSOFT
from fope_export.graph.export import export, to_onnx
from fope_export.graph.optimize import optimize
from fope_export.graph.quantize import OPERATOR, QuantizeWeights, block_of, read
from fope_export.manifest import MANIFEST
from fope_export.model.checkpoint import load_checkpoint
from fope_export.parity.run import validate
from tests.conftest import mixture, small_decoder, write_native
from tests.spoiling import attributes

LINEAR = ["attention.att_proj", "attention.attn_out", "feed_forward.ff_proj", "feed_forward.ff_out"]
LAYERS = [f"layers.{i}.{name}" for i in (0, 1) for name in LINEAR] + ["lm_head"]
CONFIGS = [
    ExportConfig(quantize=kind, dtype=dtype, cache="static" if capacity else "dynamic", capacity=capacity)
    for kind, dtype, capacity in (
        ("int4", "fp32", None), ("int4", "fp16", 96), ("int8", "fp32", 96), ("int8", "fp16", None)
    )
]  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: f"{config.quantize}-{config.dtype}-{config.cache}")
def quantized(request: pytest.FixtureRequest, native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(native, tmp_path_factory.mktemp("quantized") / "out", request.param)


def test_linear_layers_are_quantized_and_nothing_else(quantized: Bundle, native: Path) -> None:
    model, config = onnx.load(quantized.model), quantized.manifest.export
    nodes = {node.name: node for node in model.graph.node if node.op_type == OPERATOR}
    assert list(nodes) == [f"{layer}/{OPERATOR}" for layer in LAYERS]
    assert not any(node.op_type == "MatMul" for node in model.graph.node)
    assert {o.domain: o.version for o in model.opset_import} == {"": config.opset, "com.microsoft": 1, "fope": 1}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer in LAYERS:
        names = [f"{layer}.weight.{part}" for part in (config.quantize, "scales", "zero_points")]
        assert list(nodes[f"{layer}/{OPERATOR}"].input[1:]) == names
        assert {attribute.name: attribute.i for attribute in nodes[f"{layer}/{OPERATOR}"].attribute}["bits"] in (4, 8)
        assert f"{layer}.weight.T" not in tensors
    activations = onnx.TensorProto.FLOAT if config.dtype == "fp32" else onnx.TensorProto.FLOAT16
    for name, tensor in tensors.items():
        if not name.endswith((f".{config.quantize}", ".zero_points")) and not name.startswith("constant."):
            assert tensor.data_type == (onnx.TensorProto.FLOAT if ".rotary." in name else activations), name
    state = load_checkpoint(native).model.converted(config).state_dict()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensors["embed.weight"]), state["embed.weight"].numpy())


def test_it_validates_and_says_what_it_is(quantized: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    result = validate(quantized)
    assert result.passed and len(result.cases) >= 7, [case for case in result.cases if not case.verdict.passed]
    assert all(control.verdict or control.skipped for control in result.controls)
    assert result.cost is not None and result.cost.kind == quantized.manifest.export.quantize and not result.cost.strays
    assert main(["inspect", str(quantized.path)]) == 0
    assert f"{result.cost.kind} weights" in capsys.readouterr().out
    assert main(["inspect", str(quantized.model)]) == 0
    assert "blocks of 128" in capsys.readouterr().out
    assert main(["run", str(quantized.path), "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().err == ""


def test_values_have_shapes_and_onnx_runtime_is_quiet(quantized: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(quantized.model, load_external_data=False)
    shaped = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output} <= shaped
    onnxruntime.InferenceSession(quantized.model, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


def test_the_integers_stand_for_what_the_operator_multiplies_by(quantized: Bundle) -> None:
    """The operator applied to the identity gives the weight; 48 inputs leave half of the last block empty."""
    model = onnx.load(quantized.model)
    weights = {stored.module: stored.weight for stored in read(quantized.model)}
    assert list(weights) == LAYERS
    node = next(node for node in model.graph.node if node.name.startswith("layers.1.feed_forward.ff_out/"))
    dtype = np.float32 if quantized.manifest.export.dtype == "fp32" else np.float16
    kind, names = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [node.input[0], node.output[0]]
    x, y = (onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in node.input]
    alone = onnx.helper.make_model(
        onnx.helper.make_graph([node], "alone", [x], [y], tensors), ir_version=10,
        opset_imports=[onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(MICROSOFT, 1)],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {node.input[0]: np.eye(48, dtype=dtype)})
    wanted = weights["layers.1.feed_forward.ff_out"]
    np.testing.assert_allclose(got.T, wanted, rtol=0, atol=2 * np.finfo(dtype).eps * np.abs(wanted).max())


def test_exporting_again_gives_the_same_bytes(quantized: Bundle, native: Path, tmp_path: Path) -> None:
    again = export(native, tmp_path / "out", quantized.manifest.export)
    assert again.manifest == quantized.manifest and not again.damaged()


def test_a_tied_embedding_is_still_looked_up_as_it_is(tmp_path: Path) -> None:
    checkpoint = write_native(small_decoder(tie_embeddings=True), tmp_path / "checkpoint")
    made = export(checkpoint, tmp_path / "out", ExportConfig(quantize="int4", block=32))
    nodes = {node.name: list(node.input) for node in onnx.load(made.model, load_external_data=False).graph.node}
    assert nodes["embed/Gather"][0] == "lm_head.weight" and nodes[f"lm_head/{OPERATOR}"][1] == "lm_head.weight.int4"
    assert validate(made, lengths=(64,)).passed
    attributes("sin_pad", 0.0, 1)(made)
    result = validate(made, lengths=(64,))
    assert not result.passed and result.place and not result.place.tensors


def test_a_router_keeps_its_weights() -> None:
    model = to_onnx(small_decoder(experts=mixture()), ExportConfig(quantize="int4").resolved(64))
    read = [value.name or "" for node in model.graph for value in node.inputs if value is not None]
    assert any(name.startswith("layers.1.feed_forward.router.weight") for name in read)
    assert not any("router.weight.int4" in name for name in read) and "lm_head.weight.int4" in read


@pytest.mark.parametrize(
    ("inputs", "wanted", "block"),
    [(512, 128, 128), (384, 256, 128), (96, 128, 32), (48, 256, 32), (1000, 64, 32), (64, 32, 32), (192, 128, 64)],
)
def test_a_block_divides_a_layers_inputs_or_is_the_smallest(inputs: int, wanted: int, block: int) -> None:
    assert block_of(inputs, wanted) == block


def test_blocks_without_small_weights_are_an_error(native: Path, tmp_path: Path) -> None:
    for config in ({"block": 64}, {"rounding": "nearest"}, {"block": 64, "quantize": "int8-qdq"}):
        with pytest.raises(ConfigError, match=f"{next(iter(config))} is .* rounds no weights in blocks") as caught:
            convert(config, ExportConfig, where="export")
        assert caught.value.hint == "Choose quantize int4 or int8, or leave it out."
    with pytest.raises(ConfigError, match="block"):
        convert({"quantize": "int4", "block": 48}, ExportConfig, where="export")


def test_a_bundle_of_before_says_nothing_of_blocks(native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", ExportConfig(quantize="int4", block=32, rounding="nearest"))
    data = json.loads((made.path / MANIFEST).read_text())
    assert (data["export"].pop("block"), data["export"].pop("rounding")) == (32, "nearest")
    (made.path / MANIFEST).write_text(json.dumps(data))
    former = optimize(Bundle.open(made.path))
    assert former.manifest.export.described == "opset 23, fp32, int4 weights, dynamic cache"
    assert validate(former, lengths=(7, 64)).passed


def test_a_model_without_a_linear_layer_is_an_error() -> None:
    model = to_onnx(small_decoder(), ExportConfig().resolved(64))
    for node in model.graph:
        node.domain, node.op_type = contract.DOMAIN, contract.NAME
    with pytest.raises(PreconditionError, match="no linear layer"):
        QuantizeWeights(ExportConfig(quantize="int4").resolved(64))(model)


def test_bfloat16_is_refused_with_the_fields_name(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="quantize is int4 and dtype is bf16"):
        ExportConfig(quantize="int4", dtype="bf16")
    with pytest.raises(ConfigError, match="quantize"):
        ExportConfig(quantize="int2")
    command = ["export", str(native), str(tmp_path / "out"), "--quantize", "int8", "--dtype", "bf16"]
    assert main(command) == 2 and "quantize is int8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
