"""The exported file: the contract's names, any sizes, the reference's logits, the same bytes every time."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from onnx_ir.passes import PreconditionError

from fope_export.backends.base import feeds_for
from fope_export.backends.ort import OrtBackend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.errors import BackendError, ConfigError, ExportError
from fope_export.fope import contract
from fope_export.graph import passes
from fope_export.graph.export import export, to_onnx
from fope_export.manifest import MANIFEST
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.parity.run import validate
from tests.conftest import small_decoder, write_native
from tests.graph.stranger import Session
from tests.model.theirs import EXPECTED, IDS
from tests.support import same_function, truth_of


@pytest.mark.parametrize("length", [1, 16, 512, 600, 1500])
def test_the_reference_logits_come_out_whole_and_step_by_step(
    length: int, reference_bundle: Bundle, olmo_fope: Path
) -> None:
    expected = np.load(olmo_fope / "expected.npz")
    ids, wanted = expected[f"ids_{length}"], expected[f"logits_{length}"]
    session, last = Session(reference_bundle.path), wanted.shape[1]
    truth = truth_of(load_checkpoint(olmo_fope).model, ids)[:, -last:]
    single = min(length, 12)
    for steps in ((length,), ((length - single,) if length > single else ()) + (1,) * single):
        same_function(session.logits(ids, steps)[:, -last:], wanted, truth)


@pytest.mark.parametrize(
    "name", ["yarn_after", "shared_head", "wide", "zeros_kept", "tied", "nope", "rope_gqa", "norm"]
)
def test_variants_come_out_too(name: str, write_variant: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_variant(name)
    session, truth = Session(export(folder, tmp_path / "out").path), truth_of(load_checkpoint(folder).model, IDS)
    for steps in ((300,), (290, 3, *[1] * 7)):
        same_function(session.logits(IDS, steps)[:, -4:], EXPECTED[name], truth[:, -4:])


@pytest.mark.parametrize(
    ("batch", "steps"), [(1, (1,)), (1, (1, 1)), (5, (2, 1, 6)), (2, (65, 1)), (3, (1, 9))], ids=str
)
def test_any_batch_sequence_and_past(batch: int, steps: tuple[int, ...], bundle: Bundle, decoder: Decoder) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (batch, sum(steps)))
    session = Session(bundle.path)
    whole = session.logits(ids, (sum(steps),))
    same_function(session.logits(ids, steps), whole, truth_of(decoder, ids))


def test_a_left_padded_batch_is_its_rows(bundle: Bundle, decoder: Decoder) -> None:
    session, rng = Session(bundle.path), np.random.default_rng(0)
    rows = [rng.integers(0, 256, (1, n)) for n in (9, 4, 1)]
    ids = np.concatenate([np.pad(row, ((0, 0), (9 - row.shape[1], 0)), constant_values=3) for row in rows])
    mask = np.concatenate([np.pad(np.ones_like(row), ((0, 0), (9 - row.shape[1], 0))) for row in rows])
    for steps in ((9,), (7, 1, 1)):
        logits = session.logits(ids, steps, mask)
        assert np.isfinite(logits).all()
        for i, row in enumerate(rows):
            alone = session.logits(row, (row.shape[1],))[0]
            same_function(logits[i, 9 - row.shape[1] :], alone, truth_of(decoder, row)[0])


def test_names_shapes_and_types_are_the_contracts(bundle: Bundle) -> None:
    model = onnx.load(bundle.model, load_external_data=False)

    def described(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[str | int]]]:
        tensors = {value.name: value.type.tensor_type for value in values}
        return {n: (t.elem_type, [d.dim_param or d.dim_value for d in t.shape.dim]) for n, t in tensors.items()}

    tokens = (onnx.TensorProto.INT64, ["batch", "sequence"])
    inputs = {"input_ids": tokens, "attention_mask": (7, ["batch", "total_sequence"]), "position_ids": tokens}
    past = {
        f"past_key_values.{i}.{p}": (1, ["batch", 4, "past_sequence", 16]) for i in (0, 1) for p in ("key", "value")
    }
    present = {f"present.{i}.{p}": (1, ["batch", 4, "total_sequence", 16]) for i in (0, 1) for p in ("key", "value")}
    assert described(list(model.graph.input)) == inputs | past
    assert described(list(model.graph.output)) == {"logits": (1, ["batch", "sequence", 256])} | present
    assert [(port.name, port.shape) for port in bundle.manifest.inputs] == [
        (n, s) for n, (_, s) in (inputs | past).items()
    ]


def test_every_layer_calls_the_function_and_can_reach_a_plugin(bundle: Bundle) -> None:
    model = onnx.load(bundle.model, load_external_data=False)
    calls = [node for node in model.graph.node if node.domain == contract.DOMAIN]
    assert [call.name for call in calls] == [f"layers.{i}.attention.rotary/FopeRotary" for i in (0, 1)]
    for call in calls:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in call.attribute}
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"fope", b"1")
        assert (attributes["sin_pad"], attributes["cos_pad"], attributes["heads_per_group"]) == (1.0, 1.0, 1)
    assert [(f.domain, f.name) for f in model.functions] == [("fope", "FopeRotary")]
    assert [call.input[3] for call in calls] == ["layers.0.attention.rotary.freq"] * 2
    assert [call.input[4] for call in calls] == [f"layers.{i}.attention.rotary.sin_coef" for i in (0, 1)]


def test_the_file_says_where_it_comes_from_and_nothing_else(bundle: Bundle) -> None:
    model = onnx.load(bundle.model, load_external_data=False)
    assert model.producer_name == "fope-export" and model.graph.name == "fope_decoder"
    assert {entry.key: entry.value for entry in model.metadata_props}["fope.training_length"] == "64"
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b"/" + b"tests" not in bundle.model.read_bytes()


def test_weights_are_named_after_the_model_and_values_have_shapes(bundle: Bundle) -> None:
    model = onnx.load(bundle.model, load_external_data=False)
    names = {t.name for t in model.graph.initializer}
    parameters = {f"layers.1.feed_forward.{name}.weight.T" for name in ("ff_proj", "ff_out")}
    assert parameters | {"embed.weight", "lm_head.weight.T", "layers.0.attention.rotary.sin_coef"} <= names
    shaped = {value.name for value in model.graph.value_info}
    inner = {name for node in model.graph.node for name in node.output} - {v.name for v in model.graph.output}
    assert inner <= shaped


def test_onnx_runtime_says_nothing_when_it_loads_and_runs(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    Session(bundle.path).logits(np.ones((1, 5), np.int64), (3, 1, 1))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("opset", [23, 24])
def test_both_opsets(opset: Literal[23, 24], native: Path, bundle: Bundle, decoder: Decoder, tmp_path: Path) -> None:
    other = export(native, tmp_path / "out", ExportConfig(opset=opset))
    model = onnx.load(other.model, load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, "fope": 1}
    assert {o.version for f in model.functions for o in f.opset_import} == {opset}
    ids = np.random.default_rng(0).integers(0, 256, (2, 9))
    wanted = Session(bundle.path).logits(ids, (9,))
    same_function(Session(other.path).logits(ids, (8, 1)), wanted, truth_of(decoder, ids))


def test_exporting_again_gives_the_same_bytes(native: Path, bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fope_export.cli", "export", str(native), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "12345"})
    files = {path.name: path.read_bytes() for path in bundle.path.iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert {"model.onnx", "model.onnx.data", MANIFEST, "config.json", "genai_config.json", "tokenizer.json"} <= set(
        files
    )


def test_grouped_heads(tmp_path: Path) -> None:
    model = small_decoder(heads=4, kv_heads=2)
    session = Session(export(write_native(model, tmp_path / "checkpoint"), tmp_path / "out").path)
    ids = np.random.default_rng(0).integers(0, 256, (2, 70))
    same_function(session.logits(ids, (66, 1, 3)), session.logits(ids, (70,)), truth_of(model, ids))


def test_a_call_that_no_plugin_would_find_is_an_error() -> None:
    model = to_onnx(small_decoder(), ExportConfig().resolved(64))
    call = next(node for node in model.graph if node.domain == contract.DOMAIN)
    del call.attributes["plugin_namespace"]
    with pytest.raises(PreconditionError, match="no plugin would be found"):
        passes.AttachRotary()(model)


def test_a_model_without_a_call_is_an_error() -> None:
    model = to_onnx(small_decoder(), ExportConfig().resolved(64))
    for node in model.graph:
        node.domain = ""
    with pytest.raises(PreconditionError, match="no call of fope::FopeRotary"):
        passes.AttachRotary()(model)


def test_layers_that_share_numbers_in_groups(tmp_path: Path) -> None:
    model = small_decoder(num_layers=4)
    rotaries = [attention.rotary for attention in small_decoder().attentions()]
    for i, attention in enumerate(model.attentions()):
        attention.rotary = rotaries[i // 2]
    out = export(write_native(model, tmp_path / "checkpoint"), tmp_path / "out")
    calls = [node for node in onnx.load(out.model, load_external_data=False).graph.node if node.domain == "fope"]
    assert [call.input[4] for call in calls] == [f"layers.{i}.attention.rotary.sin_coef" for i in (0, 0, 2, 2)]
    assert validate(out, lengths=(64,)).passed


CONFIGS = [
    ExportConfig(dtype=dtype, cache=cache, capacity=96 if cache == "static" else None)
    for dtype in ("fp32", "fp16", "bf16")
    for cache in ("dynamic", "static")
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.dtype}-{config.cache}")
def test_dtypes_and_caches(config: ExportConfig, native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", config)
    assert made.manifest.export == config.resolved(64) and made.manifest.export.opset == (24 if config.capacity else 23)
    dtype = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}[config.dtype]
    ports = {port.name: port for port in (*made.manifest.inputs, *made.manifest.outputs)}
    kept = config.capacity or "past_sequence"
    assert (ports["past_key_values.1.value"].dtype, ports["past_key_values.1.value"].shape) == (
        dtype,
        ["batch", 4, kept, 16],
    )
    assert ports["present.1.value"].shape == ["batch", 4, config.capacity or "total_sequence", 16]
    assert ports["logits"].dtype == dtype and ports["attention_mask"].shape == ["batch", "total_sequence"]
    model = onnx.load(made.model, load_external_data=False)
    kinds = {onnx.helper.tensor_dtype_to_string(t.data_type) for t in model.graph.initializer if ".rotary." in t.name}
    assert kinds == {"TensorProto.FLOAT"}
    assert all(value == 1 for value in attribute(model, "compute_dtype"))
    result = validate(made)
    assert result.passed and len(result.cases) >= 7, [case for case in result.cases if not case.verdict.passed]


def attribute(model: onnx.ModelProto, name: str) -> list[int]:
    """Its value in every FopeRotary call."""
    calls = [node for node in model.graph.node if node.op_type == contract.NAME]
    assert calls
    return [next(a.i for a in node.attribute if a.name == name) for node in calls]


def test_a_static_cache_is_written_in_place_and_has_an_end(static_bundle: Bundle) -> None:
    backend = OrtBackend(static_bundle)
    cache = backend.empty_cache(1)
    feeds = feeds_for(np.arange(150)[None] % 256)
    _, grown = backend.step(feeds, cache)
    assert grown is cache and cache[0].numpy()[:, :, :150].all() and not cache[0].numpy()[:, :, 150:].any()
    with pytest.raises(BackendError, match="210 tokens do not fit: there is room for 200"):
        backend.step(feeds_for(np.zeros((1, 60), np.int64), np.ones((1, 210), np.int64)), cache)


def test_onnx_runtime_is_quiet_about_a_static_cache(static_bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    backend = OrtBackend(static_bundle)
    backend.step(feeds_for(np.ones((2, 5), np.int64)), backend.empty_cache(2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["pi", "yarn"])
def test_extended_models_validate_and_say_so(kind: Literal["pi", "yarn"], native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", ExportConfig(extend=kind))
    before, after = (bundle_freq(path) for path in (export(native, tmp_path / "plain"), made))
    assert made.manifest.export.extend_to == 1024 and made.manifest.export.described.endswith(f"{kind} to 1024 tokens")
    assert after[-1] < before[-1] and (after[0] == before[0]) == (kind == "yarn")
    assert validate(made, lengths=(64, 256)).passed


def bundle_freq(bundle: Bundle) -> list[float]:
    freq = bundle.manifest.spectra[0]["freq"]
    assert isinstance(freq, list)
    return freq


def test_a_model_is_not_extended_to_less_than_it_knows(native: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="extend_to is 64, and training was at 64"):
        export(native, tmp_path / "out", ExportConfig(extend="pi", extend_to=64))


def test_progress_is_told_in_bytes(native: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = export(native, tmp_path / "out", progress=lambda *step: told.append(step))
    assert told == sorted(told) and len(told) > 5 and len({total for _, total in told}) == 1
    assert told[-1][0] >= 0.9 * (made.path / "model.onnx.data").stat().st_size


def test_a_full_disk_is_noticed_before_the_work(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ExportError, match=r"needs 0.0 GB, and 0.0 GB are free") as caught:
        export(native, tmp_path / "deep" / "out")
    assert "--dtype fp16" in caught.value.hint and not (tmp_path / "deep").exists()


def block_of(low: float, high: float) -> Callable[[Decoder], None]:
    """A head whose last row has both numbers among its first inputs."""

    def change(model: Decoder) -> None:
        model.lm_head.weight[-1, :2] = torch.tensor([low, high])

    return change


def padded_channel(model: Decoder) -> None:
    """A row of q that folding multiplies by the square root of 2, and that does not fit then."""
    model.attentions()[1].att_proj.weight[7, 0] = 50_000.0


OVERFLOWS: dict[str, tuple[Callable[[Decoder], None], ExportConfig, str]] = {
    "float16": (block_of(0, 1e5), ExportConfig(dtype="fp16"), "weight reaches 100000, and float16 ends at 65504"),
    "float16, negative": (block_of(-65520, 0), ExportConfig(dtype="fp16"), "lm_head.weight reaches 65520"),
    "bfloat16": (block_of(0, 3.4e38), ExportConfig(dtype="bf16"), "weight reaches 3.4e[+]38, and bfloat16 ends"),
    "float16, folded": (
        padded_channel, ExportConfig(dtype="fp16", fold_padding=True), "att_proj.weight reaches 70710.7, and float16"
    ),
    "4 bits in float16": (
        block_of(0, 65504), ExportConfig(dtype="fp16", quantize="int4"), "lm_head.weight.T in 4 bits reaches 65520"
    ),
    "8 bits in float16": (
        block_of(0, 65504), ExportConfig(dtype="fp16", quantize="int8"), "lm_head.weight.T in 8 bits reaches 65535"
    ),
    "scales in float32": (block_of(-3e38, 3e38), ExportConfig(quantize="int4"), "in 4 bits reaches (inf|nan)"),
    "8-bit layers in float16": (
        block_of(0, 1e5), ExportConfig(dtype="fp16", quantize="int8-qdq"), "lm_head.weight reaches 100000"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_weight_that_the_dtype_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    spoil, config, message = OVERFLOWS[name]
    model = small_decoder()
    spoil(model)
    checkpoint = write_native(model, tmp_path / "in")
    with pytest.raises(ExportError, match=message) as caught:
        export(checkpoint, tmp_path / "out", config)
    assert caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [ExportConfig(dtype="fp16"), ExportConfig(dtype="fp16", quantize="int4"), ExportConfig(dtype="bf16")],
    ids=str,
)
def test_the_largest_weights_that_fit_are_exported(config: ExportConfig, tmp_path: Path) -> None:
    model = small_decoder()
    block_of(-30_000, 60_000)(model)
    assert export(write_native(model, tmp_path / "in"), tmp_path / "out", config).model.exists()
