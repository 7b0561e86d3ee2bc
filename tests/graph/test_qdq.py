"""Q and DQ around linear layers: where they are, what they compute, and that nothing else changes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto
from onnx_ir.passes import PreconditionError

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.graph import calibration
from fope_export.graph.calibration import Ranges
from fope_export.graph.export import export, to_onnx
from fope_export.graph.qdq import GRIDS, ExactInputs, InsertQdq, read
from fope_export.graph.ways import array_of
from fope_export.model.checkpoint import load_checkpoint
from fope_export.parity.run import validate
from fope_export.quantizations import QUANTIZATIONS
from tests.conftest import small_decoder, write_native

LINEAR = ["attention.att_proj", "attention.attn_out", "feed_forward.ff_proj", "feed_forward.ff_out"]
LAYERS = [f"layers.{i}.{name}" for i in (0, 1) for name in LINEAR]
CONFIGS = [
    ExportConfig(quantize=kind, dtype=dtype, cache="static" if capacity else "dynamic", capacity=capacity)
    for kind, dtype, capacity in (
        ("int8-qdq", "fp32", None), ("int8-qdq", "fp16", 96), ("int8-qdq", "bf16", None),
        ("fp8-qdq", "fp32", 96), ("fp8-qdq", "fp16", None), ("fp8-qdq", "bf16", 96),
    )
]  # fmt: skip
SMALL = {"int8-qdq": TensorProto.INT8, "fp8-qdq": TensorProto.FLOAT8E4M3FN}
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: f"{config.quantize}-{config.dtype}-{config.cache}")
def made(request: pytest.FixtureRequest, native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "SAMPLED", 1 << 9)
        return export(native, tmp_path_factory.mktemp("qdq") / "out", request.param)


def test_every_linear_layer_but_the_last_and_nothing_else(made: Bundle, native: Path) -> None:
    model, config = onnx.load(made.model), made.manifest.export
    nodes, tensors = {node.name: node for node in model.graph.node}, {t.name: t for t in model.graph.initializer}
    dtypes = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert config.quantize is not None
    kind, small = config.quantize.removesuffix("-qdq"), SMALL[config.quantize]
    for layer in LAYERS:
        product = next(node for name, node in nodes.items() if name.startswith(f"{layer}/MatMul"))
        quantize, back, widen = (
            nodes[f"{layer}{end}"] for end in ("/QuantizeLinear", "/DequantizeLinear", "/weight/DequantizeLinear")
        )
        assert list(product.input) == [back.output[0], widen.output[0]] and back.input[0] == quantize.output[0]
        assert quantize.input[1] == back.input[1] == f"{layer}.input_scale"
        assert list(widen.input) == [f"{layer}.weight.{kind}", f"{layer}.weight.scale"]
        assert tensors[widen.input[0]].data_type == dtypes[quantize.output[0]] == small
        assert dtypes[back.output[0]] == dtypes[widen.output[0]] == FLOATS[config.dtype]
        assert {tensors[name].data_type for name in (back.input[1], widen.input[1])} == {TensorProto.FLOAT}
        assert len(tensors[widen.input[1]].dims) == (kind == "int8") and f"{layer}.weight.T" not in tensors
    assert sum("QuantizeLinear" in node.op_type for node in nodes.values()) == len(LAYERS)
    assert tensors["lm_head.weight.T"].data_type == tensors["embed.weight"].data_type == FLOATS[config.dtype]
    state = load_checkpoint(native).model.state_dict()
    for stored in read(made.model):
        error = np.abs(stored.weight - state[f"{stored.module}.weight"].double().numpy())
        assert error.max() > 0 and (config.dtype != "fp32" or (error <= stored.allowed).all())


def test_it_validates_runs_and_says_what_it_is(made: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    result = validate(made, lengths=(1, 64, 200) if made.manifest.export.cache == "dynamic" else (1, 64))
    kind = made.manifest.export.quantize
    assert result.passed and all(case.verdict.passed for case in result.cases), [
        (case.name, case.verdict) for case in result.cases if not case.verdict.passed
    ]
    assert [case.rounded for case in result.cases] == [True] + [False] * (len(result.cases) - 1)
    assert result.cases[0].own.relative > 2 * result.cases[1].own.relative
    assert all(control.verdict or control.skipped for control in result.controls)
    assert result.cost is not None and result.cost.what == f"{kind} weights and inputs" and not result.cost.strays
    assert main(["inspect", str(made.path)]) == 0 and f"{kind} layers" in capsys.readouterr().out
    assert main(["inspect", str(made.model)]) == 0 and "nvidia-modelopt" in capsys.readouterr().out
    assert main(["run", str(made.path), "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().err == ""


def test_exporting_again_gives_the_same_bytes(
    made: Bundle, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SAMPLED", 1 << 9)
    again = export(native, tmp_path / "out", made.manifest.export)
    assert again.manifest == made.manifest and not again.damaged()


def test_values_have_shapes_and_onnx_runtime_is_quiet(made: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(made.model, load_external_data=False)
    shaped = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output} <= shaped
    if made.manifest.export.dtype != "bf16":
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        onnxruntime.InferenceSession(made.model, options, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", SMALL)
def test_a_grid_rounds_as_the_operators_do(kind: str) -> None:
    """ONNX Runtime's QuantizeLinear on ties, small numbers, the largest and what is beyond."""
    grid = GRIDS[QUANTIZATIONS[kind].element]
    x = np.array([0.5, 1.5, -2.5, 3.3, 2**-10, 2**-9 * 1.5, 17.0, -19.0, 126.6, 447.0, 448.0, 1e6], np.float32)
    x = x.clip(None, 127) if kind == "int8-qdq" else x
    model = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["": 23]> g (float[n] x) => (float[n] y) '
        f"<float one = {{1.0}}> "
        f"{{ q = QuantizeLinear<output_dtype={int(grid.dtype)}>(x, one) y = DequantizeLinear(q, one) }}"
    )
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x})
    got = grid.rounded(x)
    assert got.dtype == (np.int8 if kind == "int8-qdq" else ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(got.astype(np.float32), wanted)
    assert (np.abs(got.astype(float) - x.clip(None, grid.largest)) <= grid.half_a_step(got.astype(float))).all()


def test_rounding_taken_out_leaves_the_weights_and_no_trace(made: Bundle) -> None:
    model = ExactInputs()(ir.load(made.model)).model
    kinds = [node.op_type for node in model.graph]
    assert "QuantizeLinear" not in kinds and kinds.count("DequantizeLinear") == len(LAYERS)


def test_a_tied_embedding_is_still_looked_up_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLED", 1 << 9)
    checkpoint = write_native(small_decoder(tie_embeddings=True), tmp_path / "checkpoint")
    made = export(checkpoint, tmp_path / "out", ExportConfig(quantize="int8-qdq"))
    assert validate(made, lengths=(64,)).passed


def test_a_layer_that_the_graph_lacks_is_an_error_and_a_dead_one_is_not() -> None:
    model = small_decoder()
    finished = to_onnx(model, ExportConfig().resolved(64))
    dead = {"layers.0.attention.att_proj": Ranges(0.0, np.zeros(192, np.float32))}
    InsertQdq("int8-qdq", dead)(finished)
    assert (array_of(finished.graph.initializers["layers.0.attention.att_proj.weight.scale"]) == 1).all()
    with pytest.raises(PreconditionError, match=r"disagree in .*layers\.7"):
        InsertQdq("int8-qdq", {"layers.7.attention.att_proj": dead.popitem()[1]})(finished)
