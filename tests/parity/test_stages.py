"""Layer by layer: right bundles pass in every stage, and a planted mistake is found in its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from fope_export.backends.ort import open_session
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import ParityError
from fope_export.graph.export import export
from fope_export.parity import layerwise
from fope_export.parity.run import validate
from fope_export.parity.stages import StagesResult, validate_stages
from tests.conftest import small_decoder, write_native
from tests.model.hugging_face import config_of, tensors_of, write
from tests.printed import held
from tests.spoiling import attributes, weights

NAMES = ["embed", "layers.0", "layers.1", "logits"]


def failed(result: StagesResult, kind: str) -> list[str]:
    return [stage.name for stage in result.stages if getattr(stage, kind).failed]


@pytest.mark.parametrize("few", [False, True], ids=["members", "one member"])
def test_a_right_bundle_passes(few: bool, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if few:
        monkeypatch.setattr(layerwise, "WIDE", 1)
    result = validate_stages(bundle)
    assert result.passed, result.failures
    assert [stage.name for stage in result.stages] == NAMES
    for stage in result.stages[1:]:
        assert 0 < stage.own.relative < 1e-4 and 0 < stage.own.pytorch < 1e-4 and min(stage.own.ratios.values()) > 0
    assert result.stages[-1].accumulated.relative > result.stages[1].accumulated.relative


def test_a_static_cache_passes(static_bundle: Bundle) -> None:
    result = validate_stages(static_bundle, seed=3)
    assert result.passed, result.failures


WAYS = [
    ExportConfig(dtype="bf16"),
    ExportConfig(dtype="fp16", fold_padding=True),
    ExportConfig(quantize="int4"),
    ExportConfig(quantize="int8-qdq", dtype="fp16"),
]


@pytest.mark.parametrize("config", WAYS, ids=lambda config: f"{config.dtype}-{config.quantize}")
def test_other_ways_to_write_it_pass(config: ExportConfig, tmp_path: Path) -> None:
    checkpoint = write_native(small_decoder(kv_heads=2, tie_embeddings=config.quantize is None), tmp_path / "in")
    result = validate_stages(export(checkpoint, tmp_path / "out", config))
    assert result.passed, result.failures


def test_a_mixture_of_experts_passes(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", config_of("qwen3_moe"), tensors_of("qwen3_moe"))
    result = validate_stages(export(checkpoint, tmp_path / "out"))
    assert result.passed, result.failures


def scaled(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[3] *= 1.01
    return changed


MISTAKES: dict[str, tuple[Callable[[Bundle], None], int]] = {
    "embedding": (weights("embed.weight", lambda array: array * np.float32(1.001)), 0),
    "padding": (attributes("sin_pad", 0.99, 0), 1),
    "weight": (weights("layers.1.feed_forward.ff_out.weight.T", scaled), 2),
    "norm": (weights("layers.1.attn_norm.weight", scaled), 2),
    "head": (weights("lm_head.weight.T", scaled), 3),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_in_its_stage_and_in_all_that_follow(name: str, spoilable: Bundle) -> None:
    spoil, stage = MISTAKES[name]
    spoil(spoilable)
    result = validate_stages(spoilable)
    assert failed(result, "own") == [NAMES[stage]]
    assert failed(result, "accumulated") == NAMES[stage:]
    assert "model.onnx" in "".join(result.damaged) and not result.passed


def test_the_command_prints_and_writes(spoilable: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(spoilable.path), "--stages", "--json"]) == 0
    printed = held("validate-stages", capsys.readouterr().out)
    written = json.loads((spoilable.path / "reports/stages.json").read_text())
    assert printed == written and printed["passed"] and [stage["name"] for stage in printed["stages"]] == NAMES
    assert "reports/stages.json" in Bundle.open(spoilable.path).manifest.files
    MISTAKES["weight"][0](spoilable)
    assert main(["validate", str(spoilable.path), "--stages"]) == 1
    told = capsys.readouterr().out
    assert "layers.1, by itself: rms" in told and "FAILED" in told and "layers.0, " not in told


def test_arguments_that_it_does_not_have_are_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(bundle.path), "--stages", "--lengths", "7"]) == 2
    assert "--stages takes no --lengths" in capsys.readouterr().err


def test_a_model_that_has_no_room_in_float64_is_sent_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fope_export.parity.run.memory", lambda: 100_000)
    with pytest.raises(ParityError, match=r"needs 0 GB to be compared in float32, and this machine has 0 GB") as caught:
        validate(bundle)
    assert "--stages" in caught.value.hint
    assert validate_stages(bundle).passed


def test_norms_round_as_onnxruntimes_do() -> None:
    """Numbers of about one size, as random embeddings in half types are: additions are off to the same side."""
    random, (rows, size) = np.random.default_rng(0), (64, 2048)
    x = (random.integers(128, 256, (rows, size)) * random.choice([-1, 1], (rows, size)) / 2**15).astype(np.float32)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, size]) for name in "xy"]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [size], np.ones(size, np.float32))
    node = helper.make_node("RMSNormalization", ["x", "scale"], ["y"], epsilon=1e-5)
    graph = helper.make_graph([node], "norm", ports[:1], ports[1:], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    [got] = open_session(model.SerializeToString()).run(None, {"x": x})
    y, weight = torch.from_numpy(x), torch.ones(size)
    truth = nn.functional.rms_norm(y.double(), (size,), eps=1e-5)
    fused = nn.functional.rms_norm(y, (size,), eps=1e-5)
    found = torch.from_numpy(got), layerwise.OneByOne(weight, 1e-5)(y), fused
    errors = [float((each - truth).norm() / truth.norm()) for each in found]
    assert errors[0] < 2 * errors[1] and errors[1] > 10 * errors[2], errors
