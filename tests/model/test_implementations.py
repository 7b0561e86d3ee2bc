"""Every implementation in docs/checkpoints.md: its logits, and that a planted deviation is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fope_export.errors import FopeError
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.layouts.hugging_face import weight_map_of
from tests.conftest import DATA
from tests.model.hugging_face import config_of, tensors_of, write
from tests.model.implementations import GIVEN, HEAD_DIM, IDS, IMPLEMENTATIONS, qwen3_vl_moe, set_rope
from tests.model.theirs import MARGIN, distance, exact_logits, same_as_theirs

TABLE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_logits_are_what_the_source_says(name: str, tmp_path: Path) -> None:
    row = IMPLEMENTATIONS[name]
    got = exact_logits(row.write(tmp_path), IDS)
    assert distance(got, row.logits()) < MARGIN
    if len(row.freq()) < HEAD_DIM // 2:
        assert distance(got, row.logits(sin_pad=0.0)) > 100 * MARGIN


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_planted_deviation_is_refused(name: str, tmp_path: Path) -> None:
    row = IMPLEMENTATIONS[name]
    spoil, message = row.planted
    with pytest.raises(FopeError, match=message):
        load_checkpoint(row.write(tmp_path, spoil))


@pytest.mark.parametrize("name", GIVEN)
def test_logits_are_those_of_the_code_itself(name: str, tmp_path: Path) -> None:
    make, logits, _, _ = GIVEN[name]
    expected = np.load(DATA / logits / "expected.npz")
    model = load_checkpoint(make(tmp_path / "checkpoint")).model
    for length in (1, 16, 512, 600, 1500):
        same_as_theirs(model, expected[f"ids_{length}"].astype(np.int64), expected[f"logits_{length}"])


@pytest.mark.parametrize("name", GIVEN)
def test_a_change_of_their_configuration_is_refused(name: str, tmp_path: Path) -> None:
    make, _, file, (before, after, message) = GIVEN[name]
    folder = make(tmp_path / "checkpoint")
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after))
    with pytest.raises(FopeError, match=message):
        load_checkpoint(folder)


def test_a_table_names_them_all() -> None:
    rows = re.findall(r"^\| ([^|]+?) \|", TABLE.read_text(), re.MULTILINE)
    assert {name.split(",")[0] for name in (*IMPLEMENTATIONS, *GIVEN)} <= {*rows} | {"shared coefficients", "port"}


INERT: list[dict[str, Any]] = [
    {"_attn_implementation_autoset": True}, {"unsloth_version": "2025.11.1"}, {"rope_local_base": None},
    {"pad_token_id": -1}, {"pad_token_id": 96}, {"partial_rotary_factor": 1.0},
    {"original_max_position_embeddings": None},
]  # fmt: skip


@pytest.mark.parametrize("fields", INERT, ids=str)
def test_fields_that_change_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    config = config_of("intern_dense")
    wanted = load_checkpoint(write(tmp_path / "plain", config, tensors_of("intern_dense")))
    got = load_checkpoint(write(tmp_path / "more", config | fields, tensors_of("intern_dense")))
    assert got.config == wanted.config and got.config.pad_token_id is None


NAMES: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "inside a multimodal model": lambda name: f"language_model.{name}",
    "inside another": lambda name: name.replace("model.", "model.language_model.", 1),
    "wrapped and inside": lambda name: f"module.{name.replace('model.', 'model.language_model.', 1)}",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_what_a_model_was_wrapped_in(name: str, tmp_path: Path) -> None:
    tensors = tensors_of("intern_dense")
    renamed = {NAMES[name](key): tensor for key, tensor in tensors.items()}
    prefix = "module." if "wrapped" in name or name in ("both", "data parallel") else ""
    others = {f"{prefix}model.vision_model.encoder.x": torch.zeros(2), f"{prefix}visual.y": torch.zeros(2)}
    others = {} if name == "compiled" or name == "both" else others
    got = load_checkpoint(write(tmp_path / "got", config_of("intern_dense"), renamed | others)).model.state_dict()
    wanted = load_checkpoint(write(tmp_path / "wanted", config_of("intern_dense"), tensors)).model.state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_all_unknown_fields_are_named_with_what_they_could_mean() -> None:
    fields = {"query_pre_attn_scalar": 16, "sliding_windows": 4, "anything": 1}
    with pytest.raises(
        FopeError, match="unknown fields `anything`, `query_pre_attn_scalar`, `sliding_windows`"
    ) as told:
        weight_map_of(config_of("intern_dense") | fields)
    assert "scales attention's logits" in told.value.hint and "use_sliding_window" in told.value.hint


def test_a_model_with_linear_attention_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FopeError, match="'qwen3_5_moe', which needs linear attention"):
        load_checkpoint(write(tmp_path, {"model_type": "qwen3_5_moe", "text_config": {}}, {}))


def test_a_number_of_frequencies_that_no_code_keeps_names_the_split(tmp_path: Path) -> None:
    row = IMPLEMENTATIONS["Intern-S1-Pro, fope_sep_head alone"]
    with pytest.raises(FopeError) as told:
        load_checkpoint(row.write(tmp_path, row.planted[0]))
    assert "Intern-S1-Pro's own code then keeps all 8" in told.value.hint and "xtuner" in told.value.hint


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_of_qwen3_vl_moe_with_its_experts_in_two_tensors(prefix: str, tmp_path: Path) -> None:
    folder, wanted = qwen3_vl_moe(tmp_path, prefix)
    assert distance(exact_logits(folder, IDS), wanted) < 10 * MARGIN  # weights were rounded to float32


def test_experts_that_are_saved_fused(tmp_path: Path) -> None:
    """Qwen3-MoE as transformers 5 holds it: [E, 2 I, H] and [E, H, I], and its names of fields."""
    config = config_of("qwen3_moe")
    tensors = tensors_of("qwen3_moe")
    wanted = load_checkpoint(write(tmp_path / "each", config, tensors)).model.state_dict()
    for i in range(2):
        mlp, experts = f"model.layers.{i}.mlp.experts", range(config["num_experts"])
        each = {x: [tensors.pop(f"{mlp}.{e}.{x}_proj.weight") for e in experts] for x in ("gate", "up", "down")}
        tensors[f"{mlp}.gate_up_proj"] = torch.stack([*map(torch.cat, zip(each["gate"], each["up"], strict=True))])
        tensors[f"{mlp}.down_proj"] = torch.stack(each["down"])
    config["num_local_experts"] = config.pop("num_experts")
    config["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}}
    got = load_checkpoint(write(tmp_path / "fused", config, tensors)).model.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_router_that_does_not_normalize_is_refused_where_the_code_always_does(tmp_path: Path) -> None:
    folder, _ = qwen3_vl_moe(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["norm_topk_prob"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FopeError, match="whose code always normalizes"):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_frequencies_are_held_as_far_as_their_dtype_goes(dtype: torch.dtype, tmp_path: Path) -> None:
    config, tensors = config_of("intern_dense"), tensors_of("intern_dense")
    freq = load_checkpoint(write(tmp_path / "plain", config, tensors)).model.attentions()[0].rotary.freq.clone()
    for i, stored in enumerate((freq, freq * 1.02)):
        folder = write(tmp_path / str(i), config, tensors | {"model.rotary_emb.inv_freq": stored.to(dtype)})
        if i == 0:
            load_checkpoint(folder)
        else:
            with pytest.raises(FopeError, match="inv_freq is not what the configuration gives"):
                load_checkpoint(folder)


def test_a_factor_of_zero_is_one_that_was_given(tmp_path: Path) -> None:
    """Then Intern-S1-Pro's code floors as the others do, and the number of frequencies has to be theirs."""
    row = IMPLEMENTATIONS["Intern-S1-Pro, fope_sep_head alone"]
    with pytest.raises(FopeError, match="D is 8 in the weights but 3"):
        load_checkpoint(row.write(tmp_path, set_rope("rope_scaling", fope_init_factor=0.0)))
