"""Hugging Face's layout: the logits of the code it comes from, its ways of storing, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import FopeError
from fope_export.graph.export import export
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.fp8 import Fp8
from fope_export.parity.run import validate
from tests.conftest import DATA, small_decoder
from tests.graph.stranger import Session
from tests.model.hugging_face import FP8, QKV, VARIANTS, Tensors, config_of, multimodal, tensors_of, write
from tests.model.theirs import IDS, last_logits, same_as_theirs
from tests.support import same_function, truth_of

EXPECTED = np.load(DATA / "hf_variants.npz")


def same(folder: Path, name: str) -> None:
    same_as_theirs(load_checkpoint(folder).model, IDS, EXPECTED[name])


@pytest.mark.parametrize("name", VARIANTS["cases"])
def test_variants_give_their_own_codes_logits(name: str, tmp_path: Path) -> None:
    same(write(tmp_path, config_of(name), tensors_of(name)), name)


@pytest.mark.parametrize(
    "name",
    [
        "intern_moe_grouped",
        "intern_moe_mixed",
        "intern_num_inv_freq",
        "intern_shared_heads",
        "intern_bias",
        "qwen2_rope",
    ],
)
def test_variants_come_out_of_the_exported_model(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", config_of(name), tensors_of(name))
    session, truth = Session(export(folder, tmp_path / "out").path), truth_of(load_checkpoint(folder).model, IDS)
    for steps in ((300,), (290, 3, *[1] * 7)):
        same_function(session.logits(IDS, steps)[:, -4:], EXPECTED[name], truth[:, -4:])


def test_experts_and_shared_coefficients_validate_in_half_precision(tmp_path: Path) -> None:
    name = "intern_moe_grouped"
    folder = write(tmp_path / "in", config_of(name), tensors_of(name))
    assert validate(export(folder, tmp_path / "out", ExportConfig(dtype="fp16")), lengths=(64,)).passed


def test_the_language_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    same(write(tmp_path, *multimodal("intern_moe_grouped")), "intern_moe_grouped")


def sharded(folder: Path, name: str) -> Path:
    write(folder, config_of(name), {})
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i, part in enumerate(np.array_split(sorted(tensors_of(name)), 3)):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({key: tensors_of(name)[key] for key in part.tolist()}, folder / file)
        weight_map |= dict.fromkeys(part.tolist(), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_with_an_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path, "intern_dense")
    same(folder, "intern_dense")
    assert sum("of-00003" in name for name in load_checkpoint(folder).hashes()) == 3


def test_blockwise_fp8_is_multiplied_out(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored, plain = {}, {}
    for key, tensor in tensors_of("intern_dense").items():
        if tensor.ndim == 2 and ".layers." in key:
            scale = 0.5 + torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128), generator=generator)
            stored[key], stored[f"{key}_scale_inv"] = tensor.to(torch.float8_e4m3fn), scale
            assert scale.numel() == 1  # these matrices are small; larger ones below
            plain[key] = tensor.to(torch.float8_e4m3fn).float() * scale
        else:
            stored[key] = plain[key] = tensor
    config = config_of("intern_dense")
    quantized = config | {"quantization_config": FP8}
    got, wanted = (
        last_logits(load_checkpoint(folder).model, IDS, 4)
        for folder in (write(tmp_path / "fp8", quantized, stored), write(tmp_path / "plain", config, plain))
    )
    np.testing.assert_array_equal(got, wanted)


def test_scales_are_spread_over_their_blocks(tmp_path: Path) -> None:
    tensor, scale = torch.ones(200, 130).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    got = Fp8.of(FP8).multiplied("x.weight", tensor, scale, "here")
    assert got.shape == (200, 130)
    assert [got[i, j].item() for i, j in ((127, 127), (127, 128), (128, 127), (199, 129))] == [1, 2, 3, 4]


@pytest.mark.parametrize("spelling", ["rope_parameters", "type"])
def test_fope_is_found_where_other_versions_keep_it(spelling: str, tmp_path: Path) -> None:
    config = config_of("intern_linear")
    rope = config.pop("rope_scaling")
    if spelling == "type":
        config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    else:
        config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    same(write(tmp_path, config, tensors_of("intern_linear")), "intern_linear")


def test_a_stored_inv_freq_is_a_checksum(tmp_path: Path) -> None:
    freq = load_checkpoint(write(tmp_path, config_of("intern_dense"), tensors_of("intern_dense"))).model.attentions()[0]
    right = {"model.rotary_emb.inv_freq": freq.rotary.freq.clone()}
    same(write(tmp_path, config_of("intern_dense"), tensors_of("intern_dense") | right), "intern_dense")


@pytest.mark.parametrize("embedding", ["pos_emb", "rotary_emb"])
def test_a_port_of_the_papers_code_to_grouped_queries(embedding: str, tmp_path: Path) -> None:
    model = small_decoder(kv_heads=2)
    c, state = model.config, model.state_dict()
    stored = {
        "model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }  # fmt: skip
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        q, k, v = state[f"{ours}.attention.att_proj.weight"].split((64, 32, 32))
        up, gate = state[f"{ours}.feed_forward.ff_proj.weight"].chunk(2)
        stored |= {
            f"{theirs}.input_layernorm.weight": state[f"{ours}.attn_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": state[f"{ours}.ff_norm.weight"],
            f"{theirs}.self_attn.q_proj.weight": q, f"{theirs}.self_attn.k_proj.weight": k,
            f"{theirs}.self_attn.v_proj.weight": v, f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.self_attn.o_proj.weight": state[f"{ours}.attention.attn_out.weight"],
            f"{theirs}.mlp.down_proj.weight": state[f"{ours}.feed_forward.ff_out.weight"],
        } | {
            f"{theirs}.self_attn.{embedding}.{name}": state[f"{ours}.attention.rotary.{name}"]
            for name in ("sin_coef", "cos_coef")
        }  # fmt: skip
    config = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "fourier": True,
    }  # fmt: skip
    folder = write(tmp_path, config, {name: tensor.contiguous() for name, tensor in stored.items()})
    loaded = load_checkpoint(folder).model
    assert loaded.config.spectrum == c.spectrum
    np.testing.assert_array_equal(last_logits(loaded, IDS, 4), last_logits(model, IDS, 4))


Spoil = Callable[[Path], object]


def field(name: str, value: Any) -> Spoil:
    """Set a field of config.json; a None in a path of names removes it."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        *path, last = name.split(".")
        section = config
        for step in path:
            section = section[step]
        section[last] = value
        if value is ...:
            del section[last]
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def stored(change: Callable[[Tensors], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


CASES: dict[str, tuple[Spoil, str]] = {
    "unknown field": (field("sliding_windows", 4), "unknown field `sliding_windows`"),
    "unknown field of FoPE": (field("rope_scaling.fope_gain", 1.0), "rope_parameters: .*unknown field `fope_gain`"),
    "missing size": (field("num_key_value_heads", ...), "required field `num_key_value_heads`"),
    "no theta": (field("rope_theta", ...), "required field `rope_theta`"),
    "activation": (field("hidden_act", "gelu"), "hidden_act is 'gelu'"),
    "biases of the feed-forward part": (field("mlp_bias", True), "mlp_bias is True"),
    "sliding window": (field("use_sliding_window", True), "use_sliding_window is True"),
    "layer type": (field("layer_types", ["full_attention", "linear_attention"]), "layer_types has .'linear_attention'"),
    "rope type": (field("rope_scaling.rope_type", "dynamic"), "rope_type is 'dynamic'"),
    "factor without effect": (field("rope_scaling.factor", 2.0), "factor is 2.0 with rope_type 'default'"),
    "two descriptions": (field("rope_parameters", {"rope_theta": 5e4}), "rope_theta is 50000.0 and 10000.0"),
    "two kinds of FoPE": (field("fourier", True), "fourier and rope_scaling both"),
    "training length": (field("max_position_embeddings", 1024), "D is 6 in the weights but 9 from the configuration"),
    "number of frequencies": (field("rope_scaling.num_inv_freq", 7), "D is 6 in the weights but 7"),
    "heads": (field("num_attention_heads", 3), "3 query heads cannot share 2"),
    "experts without sizes": (field("num_experts", 4), "num_experts needs num_experts_per_tok"),
    "other quantization": (field("quantization_config", {"quant_method": "gptq"}), "quant_method is 'gptq'"),
    "end outside": (field("eos_token_id", 96), "eos_token_id is 96, outside a vocabulary of 96"),
    "missing tensor": (stored(lambda t: t.pop(QKV)), f"1 tensors missing: {QKV}"),
    "left-over tensor": (stored(lambda t: t.update(x=torch.zeros(1))), "1 tensors left over: x"),
    "fp8 without scale": (stored(lambda t: t.update({QKV: t[QKV].to(torch.float8_e4m3fn)})), "without .*_scale_inv"),
    "scale without fp8": (stored(lambda t: t.update({f"{QKV}_scale_inv": torch.ones(1, 1)})), "float32 and has"),
    "wrong checksum": (
        stored(lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(6)})),
        "inv_freq is not what the configuration gives",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_checkpoints_are_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = CASES[name]
    folder = write(tmp_path / "in", config_of("intern_dense"), tensors_of("intern_dense"))
    spoil(folder)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "hint:" in told and "Traceback" not in told and not (tmp_path / "out").exists()
    with pytest.raises(FopeError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("groups", "message"), [(3, "cannot be taken evenly from 3 groups"), (8, "cannot be taken evenly from 8 groups")]
)
def test_a_router_that_does_not_divide(groups: int, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, config_of("intern_moe_grouped"), tensors_of("intern_moe_grouped"))
    field("router_n_groups", groups)(folder)
    with pytest.raises(FopeError, match=message):
        load_checkpoint(folder)


INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"
BROKEN: dict[str, tuple[Spoil, str]] = {
    "a shard is gone": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is not there"),
    "a shard of another checkpoint": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / SHARD),
        "is not in the file that the index says",
    ),
    "no index": (lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
    "a path that leaves the folder": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "../x"}}'), "no weight_map"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_shards(name: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[name]
    spoil(sharded(tmp_path, "intern_dense"))
    with pytest.raises(FopeError, match=message):
        load_checkpoint(tmp_path)


def test_a_model_type_that_nobody_knows(tmp_path: Path) -> None:
    config = multimodal("intern_dense")[0]
    config["text_config"]["model_type"] = "mamba"
    with pytest.raises(FopeError, match="model_type is 'mamba'"):
        load_checkpoint(write(tmp_path, config, {}))
