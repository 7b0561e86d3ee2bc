"""Weights of 4 bits for TensorRT: what the file holds, by the operators' definition, and every mistake refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import ConfigError, ExportError
from fope_export.graph import awq, calibration, nvfp4
from fope_export.graph.calibration import smoothed
from fope_export.graph.export import export
from fope_export.graph.openvino import passes_for
from fope_export.graph.optimize import optimize
from fope_export.graph.ways import way_of
from fope_export.manifest import MODEL, plain_file
from fope_export.model.checkpoint import load_checkpoint, source_of
from fope_export.parity.quantized import cost_of
from fope_export.parity.run import validate
from tests.conftest import small_decoder

LINEAR = ["attention.att_proj", "attention.attn_out", "feed_forward.ff_proj", "feed_forward.ff_out"]
LAYERS = [f"layers.{i}.{name}" for i in (0, 1) for name in LINEAR]
ELEMENTS = {"int4-awq": TensorProto.INT4, "nvfp4": TensorProto.FLOAT4E2M1}
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CONFIGS = [("int4-awq", "fp32"), ("int4-awq", "fp16"), ("nvfp4", "fp32"), ("nvfp4", "bf16")]


@pytest.fixture(scope="module")
def sound(native: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "SAMPLED", 1 << 9)
        return {
            (kind, dtype): export(native, folder / f"{kind}-{dtype}", ExportConfig(quantize=kind, dtype=dtype))
            for kind, dtype in CONFIGS
        }


@pytest.fixture(params=CONFIGS, ids="-".join)
def made(request: pytest.FixtureRequest, sound: dict[tuple[str, str], Bundle]) -> Bundle:
    return sound[request.param]


def test_every_linear_layer_but_the_last_and_nothing_else(made: Bundle) -> None:
    model, config = onnx.load(made.model), made.manifest.export
    nodes, tensors = {node.name: node for node in model.graph.node}, {t.name: t for t in model.graph.initializer}
    assert config.quantize is not None
    numbers, own = config.quantize.removesuffix("-awq"), FLOATS[config.dtype]
    for layer in LAYERS:
        product = next(node for name, node in nodes.items() if name.startswith(f"{layer}/MatMul"))
        back = nodes[f"{layer}/weight/DequantizeLinear"]
        carried = {each.name: each.i for each in back.attribute}
        small = tensors[f"{layer}.weight.{numbers}"]
        assert product.input[1] == back.output[0] and back.input[0] == small.name
        assert small.data_type == ELEMENTS[config.quantize] and f"{layer}.weight.T" not in tensors
        assert carried == {"axis": 0, "block_size": 16 if numbers == "nvfp4" else np.gcd(small.dims[0], 128)}
        if numbers == "nvfp4":
            inner = nodes[f"{layer}/weight/scale/DequantizeLinear"]
            assert back.input[1] == inner.output[0]
            assert tensors[f"{layer}.weight.block_scale"].data_type == TensorProto.FLOAT8E4M3FN
        else:
            before = nodes[f"{layer}/Mul"]
            assert product.input[0] == before.output[0] and before.input[1] == f"{layer}.pre_quant_scale"
            assert tensors[before.input[1]].data_type == own
        assert tensors[f"{layer}.weight.scale"].data_type == own
    assert tensors["lm_head.weight.T"].data_type == tensors["embed.weight"].data_type == own
    kinds = [node.op_type for node in model.graph.node]
    assert "QuantizeLinear" not in kinds and kinds.count("DequantizeLinear") == len(LAYERS) * (1 + (numbers == "nvfp4"))


def test_it_validates_runs_and_says_what_it_is(
    made: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = optimize(shutil.copytree(made.path, tmp_path / "bundle"))
    result = validate(made, lengths=(1, 64))
    kind = made.manifest.export.quantize
    assert result.passed and result.cost is not None and not result.cost.strays and result.cost.kl > 0
    assert result.cost.what == f"{kind} weights" and not any(case.rounded for case in result.cases)
    assert main(["inspect", str(made.path)]) == 0 and f"{kind} weights" in capsys.readouterr().out
    assert main(["run", str(made.path), "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match=f"{kind} weights, written for TensorRT"):
        passes_for(made)


@pytest.mark.parametrize("kind", ELEMENTS)
def test_exporting_again_gives_the_same_bytes(
    kind: str, sound: dict[tuple[str, str], Bundle], native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SAMPLED", 1 << 9)
    made = sound[kind, "fp32"]
    again = export(native, tmp_path / "out", made.manifest.export)
    assert again.manifest == made.manifest and not again.damaged()


def test_what_is_read_is_what_the_operators_put_out_near_the_checkpoint(made: Bundle, native: Path) -> None:
    """The nodes of the file itself, by ONNX's reference, and not by what wrote them."""
    model, row = onnx.load(made.model), made.manifest.export.quantization
    assert row is not None
    state, seen = load_checkpoint(native).model.state_dict(), []
    for stored in way_of(row).read(made.model):
        steps = [node for node in model.graph.node if node.name.startswith(f"{stored.module}/weight/")]
        read = {name for node in steps for name in node.input}
        graph = onnx.helper.make_graph(
            steps, "weight", [], [onnx.helper.make_value_info(steps[-1].output[0], onnx.TypeProto())],
            [tensor for tensor in model.graph.initializer if tensor.name in read],
        )  # fmt: skip
        part = onnx.helper.make_model(graph, opset_imports=model.opset_import)
        (put_out,) = ReferenceEvaluator(part).run(None, {})
        wanted = torch.from_numpy(stored.weight).to(getattr(torch, made.manifest.export.precision)).double().numpy()
        np.testing.assert_array_equal(np.asarray(put_out).T.astype(np.float64), wanted)
        error = np.abs(stored.for_inputs(torch.float64).numpy() - state[f"{stored.module}.weight"].double().numpy())
        assert error.max() > 0 and (made.manifest.export.dtype != "fp32" or (error <= stored.allowed).all())
        assert row.name != "nvfp4" or np.array_equal(wanted, stored.weight)  # every dtype holds what NVFP4 stands for
        seen.append(stored.module)
    assert seen == LAYERS


def test_a_copy_for_runtimes_without_the_numbers_reads_the_same_bytes(made: Bundle) -> None:
    plain, quantize = plain_file(made.manifest.export), made.manifest.export.quantize
    assert (plain == MODEL) == (quantize == "int4-awq" and made.manifest.export.dtype != "bf16")
    if quantize != "nvfp4":
        return
    assert plain_file(ExportConfig(quantize="nvfp4", dtype="fp16")) == "model.float16.onnx"
    theirs, ours = (
        {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
        for path in (made.path / plain, made.model)
    )
    name = f"{LAYERS[0]}.weight.nvfp4"
    assert theirs[name].data_type == TensorProto.UINT4 and ours[name].data_type == TensorProto.FLOAT4E2M1
    assert list(theirs[name].external_data) == list(ours[name].external_data) != []
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # or the copy has no reason any more
        onnxruntime.InferenceSession(made.model, providers=["CPUExecutionProvider"])


def test_integers_are_the_nearest_and_symmetric() -> None:
    weight = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
    weight[:128, 0], weight[128:, 1] = 0, 1e-42
    for dtype in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)):
        whole, steps = awq.in_steps("w", weight, dtype)
        assert whole.dtype == ml_dtypes.int4 and steps.shape == (2, 8) and steps.dtype == dtype
        integers, each = whole.astype(np.float64), steps.astype(np.float64).repeat(128, axis=0)
        assert integers.min() == -7 and integers.max() == 7
        grid = np.arange(-7, 8)[:, None, None] * each
        assert (np.abs(integers * each - weight) <= np.abs(grid - weight).min(0) + 1e-6 * each).all()
    assert len(awq.in_steps("w", weight[:96], np.dtype(np.float32))[1]) == 3  # the next smaller block that divides


def test_e2m1_numbers_are_the_nearest_with_ties_to_even() -> None:
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (numbers[:-1] + numbers[1:]) / 2
    values = np.concatenate([numbers, middles, [0.2, 2.6, 5.9], -middles]).astype(np.float32)
    weight = np.zeros((32, 2), np.float32)
    weight[: len(values), 0] = values
    small, steps, power = nvfp4.in_steps("w", weight, np.dtype(np.float32))
    assert np.log2(power) % 1 == 0 and (steps.astype(float)[:, 1] == 0).all()
    got = small.astype(np.float64)[: len(values), 0]
    even = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4}
    wanted = [
        np.sign(v) * even.get(abs(v), numbers[np.abs(numbers - abs(v)).argmin()]) for v in values.astype(float).tolist()
    ]
    assert (steps.astype(float) * power)[0, 0] == 1  # so that the values are on the grid as they are
    np.testing.assert_array_equal(got[:16], wanted[:16])
    assert (np.abs(got[:16] - values[:16]) <= nvfp4.half_a_step(got[:16])).all()
    assert (
        nvfp4.DOUBLED.tolist()
        == (np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(float) * 2).tolist()
    )


def test_what_a_dtype_does_not_hold_and_layers_without_blocks_are_errors() -> None:
    weight = np.full((32, 2), 65504, np.float32)
    for module in (awq, nvfp4):
        with pytest.raises(ExportError, match=r"w in 4 bits reaches .* which float16 does not hold"):
            module.in_steps("w", weight * 1.2, np.dtype(np.float16))
    narrow = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["": 23]> g (float[n, 24] x, float[24, 8] w) => (y) { y = MatMul(x, w) }'
    )
    narrow.graph.register_initializer(ir.Value(name="a.weight.T", const_value=ir.tensor(np.ones((24, 8), np.float32))))
    narrow.graph.node(0).replace_input_with(1, narrow.graph.initializers["a.weight.T"])
    with pytest.raises(ExportError, match="no linear layer has inputs in blocks of 16"):
        nvfp4.write(ExportConfig(quantize="nvfp4"), None)[0](narrow)


def test_factors_leave_less_error_where_inputs_differ_in_size() -> None:
    """Outputs of the layers behind norms, on the text that was measured, with Model Optimizer's factors and without."""
    model, windows = small_decoder(), np.random.default_rng(0).integers(0, 256, (4, 33))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "_norm.weight" in name:
            parameter.data = torch.logspace(-1, 1, len(parameter))[order]
    seen: dict[str, np.ndarray] = {}
    scales = smoothed(model, "int4-awq", windows)
    for name in scales:
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].numpy()}))
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        model(ids, torch.ones_like(ids), torch.arange(33)[None].expand(4, -1), model.empty_cache(4))
    assert list(scales) == LAYERS
    for name in (LAYERS[0], LAYERS[4]):
        weight: np.ndarray = model.get_parameter(f"{name}.weight").detach().numpy().T
        x = seen[name].reshape(-1, 64)
        errors = []
        for factors in (scales[name], np.ones(64, np.float32)):
            whole, steps = awq.in_steps("w", (weight / factors[:, None]).astype(np.float32), weight.dtype)
            back = whole.astype(np.float32) * steps.repeat(64, axis=0)
            errors.append(np.linalg.norm((x * factors) @ back - x @ weight))
        assert errors[0] < errors[1]


def test_inputs_that_are_not_finite_are_an_error() -> None:
    model = small_decoder()
    model.get_parameter("layers.1.attn_norm.weight").data[0] = float("inf")
    with pytest.raises(ExportError, match="cannot calibrate the model: logits are not finite"):
        smoothed(model, "int4-awq", np.zeros((1, 9), np.int64))


def in_place(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Bundle], None]:
    """Change a tensor's bytes where they lie, in every graph that has it."""

    def spoil(bundle: Bundle) -> None:
        done = set[tuple[str, str]]()
        for file in {MODEL, plain_file(bundle.manifest.export)}:
            graph = onnx.load(bundle.path / file, load_external_data=False)
            for tensor in (each for each in graph.graph.initializer if each.name.removesuffix(".half") == name):
                shape = list(tensor.dims)
                if tensor.data_location == TensorProto.EXTERNAL:
                    place = {each.key: each.value for each in tensor.external_data}
                    if (where := (place["location"], place["offset"])) not in done:
                        data, done = np.memmap(bundle.path / where[0], np.uint8, "r+"), done | {where}
                        part = slice(int(where[1]), int(where[1]) + int(place["length"]))
                        data[part] = change(data[part].reshape(shape[0], -1)).ravel()
                else:
                    raw = np.frombuffer(tensor.raw_data, np.uint8).reshape(shape[0] if shape else 1, -1)
                    tensor.raw_data = change(raw).tobytes()
            onnx.save(graph, bundle.path / file)

    return spoil


def without_factors(bundle: Bundle) -> None:
    graph = onnx.load(bundle.model, load_external_data=False)
    for node in graph.graph.node:
        if node.name == f"{LAYERS[0]}/Mul":
            taken, given = node.output[0], node.input[0]
    for node in graph.graph.node:
        node.input[:] = [given if name == taken else name for name in node.input]
    onnx.save(graph, bundle.model)


def swapped(packed: np.ndarray) -> np.ndarray:
    """The two numbers of each byte."""
    return packed << 4 | packed >> 4


def rolled(rows: np.ndarray) -> np.ndarray:
    """Each block with the scales of another."""
    return np.roll(rows, 1, axis=0)


def doubled(raw: np.ndarray) -> np.ndarray:
    """A float32 number."""
    return (raw.copy().view(np.float32) * 2).view(np.uint8)


SPOILED = {
    "int4-awq nibbles": (LAYERS[1], in_place(f"{LAYERS[1]}.weight.int4", swapped)),
    "int4-awq scales": (LAYERS[7], in_place(f"{LAYERS[7]}.weight.scale", rolled)),
    "int4-awq factors": (LAYERS[4], in_place(f"{LAYERS[4]}.pre_quant_scale", rolled)),
    "int4-awq no factors": (LAYERS[0], without_factors),
    "nvfp4 nibbles": (LAYERS[1], in_place(f"{LAYERS[1]}.weight.nvfp4", swapped)),
    "nvfp4 scales": (LAYERS[3], in_place(f"{LAYERS[3]}.weight.block_scale", rolled)),
    "nvfp4 twice the scale": (LAYERS[5], in_place(f"{LAYERS[5]}.weight.scale", doubled)),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_bundle_is_refused_and_the_layer_named(
    name: str, sound: dict[tuple[str, str], Bundle], tmp_path: Path
) -> None:
    kind, (layer, spoil) = name.split()[0], SPOILED[name]
    spoil(spoilt := Bundle.open(shutil.copytree(sound[kind, "fp32"].path, tmp_path / "bundle"), verify=False))
    strays = cost_of(spoilt, source_of(spoilt).model, load_backend(spoilt)).strays
    assert strays == (f"{layer}.weight",)
    if name in ("int4-awq no factors", "nvfp4 nibbles"):
        result = validate(spoilt, lengths=(7,))
        assert not result.passed and result.place is not None and result.place.tensors == strays
