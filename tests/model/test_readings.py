"""What a config.json means where it is silent, and what a port's flags mean: held against transformers, and against the
definition written anew.
"""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fope_export.errors import ConfigError, FopeError
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.layouts.hf_fields import HfFlags
from fope_export.model.layouts.hugging_face import weight_map_of
from tests.model.hugging_face import config_of, tensors_of, write
from tests.model.theirs import MARGIN, distance, exact_logits

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
NEEDED: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {}, "qwen3_moe": EXPERTS}
IDS = torch.randint(96, (2, 200), generator=torch.Generator().manual_seed(3))


def theirs(kind: str, **fields: Any) -> tuple[PretrainedConfig, torch.nn.Module]:
    """transformers' model of a type with random weights; its inner products are made large enough to attend."""
    config = AutoConfig.for_model(kind, **(SIZES | NEEDED[kind] | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return config, model


def saved(folder: Path, kind: str, model: torch.nn.Module, fields: dict[str, Any]) -> Path:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return write(folder, {"model_type": kind} | SIZES | fields, state)


def their_logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model.double()(IDS).logits
    return logits


@pytest.mark.parametrize("kind", NEEDED)
def test_a_silent_config_gives_transformers_logits(kind: str, tmp_path: Path) -> None:
    _, model = theirs(kind)
    assert distance(exact_logits(saved(tmp_path, kind, model, NEEDED[kind]), IDS), their_logits(model)) < MARGIN


def test_experts_weights_are_not_normalized_unless_it_is_said(tmp_path: Path) -> None:
    _, model = theirs("qwen3_moe")
    said = [saved(tmp_path / str(i), "qwen3_moe", model, EXPERTS | {"norm_topk_prob": i == 1}) for i in (0, 1)]
    wanted = their_logits(model)
    assert distance(exact_logits(said[0], IDS), wanted) < MARGIN
    assert distance(exact_logits(said[1], IDS), wanted) > 100 * MARGIN
    _, model = theirs("qwen3_moe", norm_topk_prob=True)
    assert distance(exact_logits(said[1], IDS), their_logits(model)) < MARGIN


TEXTS = ("qwen3_vl_text", "qwen3_vl_moe_text")
"""Types of the text in multimodal models."""
NO_MODEL = ("eos_token_id", "pad_token_id")
"""What ends a text or fills a row is no part of the model."""
KNOWN = {
    kind: {name: getattr(config, name) for name in HfFlags.__struct_fields__ if hasattr(config, name)}
    for kind, config in ((kind, AutoConfig.for_model(kind, num_hidden_layers=2)) for kind in (*NEEDED, *TEXTS))
}
"""transformers' own values of the fields that we read, of those that it knows in each model type."""
UNSAID = {field.name for field in msgspec.structs.fields(HfFlags) if field.required} | {"rope_theta", *EXPERTS}
"""Fields that have to be said."""


@pytest.mark.parametrize(("kind", "field"), [(k, f) for k in KNOWN for f in KNOWN[k] if f not in NO_MODEL])
def test_a_field_left_out_means_what_transformers_takes(kind: str, field: str) -> None:
    said = {"model_type": kind} | {name: value for name, value in KNOWN[kind].items() if name not in NO_MODEL}
    stated = weight_map_of(said)
    del said[field]
    if field in UNSAID:
        with pytest.raises(ConfigError, match=field):
            weight_map_of(said)
    else:
        silent = weight_map_of(said)
        assert (silent.config, silent.sources) == (stated.config, stated.sources)


def clamped(kind: str, length: int, ratio: float = 1.0) -> tuple[torch.nn.Module, Tensor]:
    """transformers' model with frequencies below one period in `length` tokens set to 0, as RotaryEmbedding's are."""
    _, model = theirs(kind)
    freq = model.get_buffer("model.rotary_emb.inv_freq")
    freq[freq < 2 * math.pi / length * ratio] = 0.0
    assert 0 < int((freq == 0).sum()) < len(freq)
    return model, freq


CLAMPS = {"rope_clamp_floor_freq": True, "rope_clamp_floor_to_zero": True}


@pytest.mark.parametrize("ratio", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_port_without_fourier_clamps_its_frequencies(kind: str, ratio: float, tmp_path: Path) -> None:
    model, _ = clamped(kind, 128, ratio)
    flags = CLAMPS | {"fourier": False, "rope_floor_freq_ratio": ratio}
    wanted, got = their_logits(model), exact_logits(saved(tmp_path / "port", kind, model, flags), IDS)
    assert distance(got, wanted) < MARGIN
    assert distance(exact_logits(saved(tmp_path / "rope", kind, model, {}), IDS), wanted) > 100 * MARGIN


@pytest.mark.parametrize(
    "flags",
    [
        {"fourier": False}, dict.fromkeys(CLAMPS, False), dict.fromkeys((*CLAMPS, "fourier"), False) | {"rope": True},
        {"rope_clamp_floor_to_zero": True, "rope_full_precision": True}, {"fourier_dim": 128, "fourier": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_port_that_clamps_nothing_is_rope(flags: dict[str, bool], tmp_path: Path) -> None:
    _, model = theirs("llama")
    assert distance(exact_logits(saved(tmp_path, "llama", model, flags), IDS), their_logits(model)) < MARGIN


def test_a_ports_base_may_stand_among_the_parameters() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "rope_theta"}
    moved = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | sizes | CLAMPS
    assert weight_map_of(moved).config == weight_map_of({"model_type": "llama"} | SIZES | CLAMPS).config


LENGTH, WIDTH, GROUPS = 128, 16, 2


def coefficients(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.eye(*shape[-2:]) + 0.3 * torch.rand(shape, generator=generator) for _ in range(2)]


def port(folder: Path, flags: dict[str, Any], coefs: dict[str, Tensor]) -> Path:
    """A Llama whose layers hold `coefs`."""
    _, model = theirs("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {f"model.layers.{i}.self_attn.pos_emb.{n}": coef.clone() for i in range(2) for n, coef in coefs.items()}
    return write(folder, {"model_type": "llama", "fourier": True} | SIZES | flags, state)


def defined(x: Tensor, sin_coef: Tensor, cos_coef: Tensor, freq: Tensor, *, padded: bool, full: bool) -> Tensor:
    """FourierEmbedding.forward of x [B, H, S, E]: the wave of every kept frequency, mixed, and padded with 1."""
    t = x.float() if full else x
    angles = torch.arange(x.shape[2], dtype=torch.float)[:, None] * freq
    tables = []
    for wave, coef in ((angles.sin(), sin_coef), (angles.cos(), cos_coef)):
        mixed = torch.einsum("td,hdf->htf", wave, coef)
        if padded:
            mixed = torch.nn.functional.pad(mixed, (0, x.shape[-1] // 2 - mixed.shape[-1]), value=1)
        tables.append(torch.cat((mixed, mixed), -1).to(t.dtype))
    left, right = t.chunk(2, -1)
    return (t * tables[1] + torch.cat((-right, left), -1) * tables[0]).to(x.dtype)


def base(length: int | None, dim: int = WIDTH) -> Tensor:
    freq = 1.0 / (1e4 ** (torch.arange(0, dim, 2).float() / dim))
    return freq if length is None else torch.where(freq < 2 * math.pi / length, 0.0, freq)


D = int((base(LENGTH) != 0).sum())
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...], Tensor, bool]] = {
    "silent": ({}, (GROUPS, D, min(D, 4)), base(LENGTH)[:D], True),
    "clamped": (CLAMPS, (GROUPS, D, min(D, 4)), base(LENGTH)[:D], True),
    "not clamped": (dict.fromkeys(CLAMPS, False), (GROUPS, 8, 4), base(None), True),
    "zeros kept": (CLAMPS | {"fourier_ignore_zero": False}, (GROUPS, 8, 8), base(LENGTH), False),
    "shared": (CLAMPS | {"fourier_separate_head": False}, (D, min(D, 4)), base(LENGTH)[:D], True),
    "more frequencies than channels": (
        CLAMPS | {"fourier_dim": 32}, (GROUPS, int((base(LENGTH, 32) != 0).sum()), 4),
        base(LENGTH, 32)[base(LENGTH, 32) != 0], True,
    ),
    "half precision": (CLAMPS | {"rope_full_precision": False}, (GROUPS, D, min(D, 4)), base(LENGTH)[:D], True),
    "normalized": (CLAMPS | {"fourier_norm": True}, (GROUPS, D, min(D, 4)), base(LENGTH)[:D], True),
    "one basis": (CLAMPS | {"fourier_separate_basis": False}, (GROUPS, D, min(D, 4)), base(LENGTH)[:D], True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_ports_fourier_is_its_definition(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    flags, shape, freq, padded = VARIANTS[name]
    sin, cos = coefficients(shape)
    if single := flags.get("fourier_separate_basis") is False:
        cos = sin
    stored = {"fourier_coef": sin} if single else {"sin_coef": sin, "cos_coef": cos}
    rotary = load_checkpoint(port(tmp_path, flags, stored)).model.attentions()[1].rotary
    x = torch.randn(2, GROUPS, 90, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    if flags.get("fourier_norm"):
        sin, cos = (coef / coef.sum(-2, keepdim=True) for coef in (sin, cos))
    full = flags.get("rope_full_precision", True)
    sin, cos = (coef if coef.ndim == 3 else coef[None] for coef in (sin, cos))
    wanted = defined(x, sin, cos, freq, padded=padded, full=full)
    with torch.inference_mode():
        got = rotary(x.transpose(1, 2), x.transpose(1, 2), torch.arange(90).expand(2, -1))[0].transpose(1, 2)
    assert rotary.config.full_precision is full
    unit = torch.finfo(dtype).eps
    # A unit in the last place of the result, and 8 of the float32 angles' sums, which may be added in another order.
    torch.testing.assert_close(got, wanted, rtol=unit, atol=unit + 8 * 90 * torch.finfo(torch.float32).eps)
    if dtype != torch.float32:
        other = defined(x, sin, cos, freq, padded=padded, full=not full)
        assert (got - wanted).float().abs().mean() < 0.1 * (other - wanted).float().abs().mean()


@pytest.mark.parametrize(
    ("flags", "full"),
    [
        ({}, False),
        ({"fourier": False}, True),
        ({"rope_full_precision": False}, False),
        ({"rope_full_precision": True}, True),
    ],
    ids=str,
)
def test_rope_turns_in_the_precision_that_its_code_has(flags: dict[str, bool], full: bool) -> None:
    assert weight_map_of({"model_type": "llama"} | SIZES | flags).config.spectrum.full_precision is full


PORT = {"fourier": True}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a floor that is not zero": (PORT | CLAMPS | {"rope_clamp_floor_to_zero": False}, "needs rope_clamp_floor_to_zero"),
    "no rope": (PORT | {"rope": False}, "fourier needs rope"),
    "a port that is scaled": (PORT | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "both describe"),
    "a flag of a port beside another FoPE": (
        {"rope_clamp_floor_freq": False, "rope_scaling": {"fope_init_factor": 0.5}}, "both describe"
    ),
    "ceiling": (PORT | {"rope_clamp_upper_freq": True}, "rope_clamp_upper_freq is True"),
    "an extension without decay": (
        PORT | {"len_extra": True, "len_extra_type": "YARN", "len_extra_orig_length": 64, "rope_theta": 1.0},
        "YARN needs a rope_theta above 1",
    ),
    "turns without end": (
        PORT
        | {"len_extra": True, "len_extra_type": "YARN", "len_extra_orig_length": 64}
        | {"len_extra_yarn_beta_fast": 1e308},
        "beta_fast or _slow is no number of turns",
    ),
    "a head without end": ({"head_dim": 10**30}, "head_dim: Expected `int` <= 4096"),
    "frequencies without end": (PORT | {"fourier_dim": 10**9}, "a head has 1000000000 channels"),
    "learnable frequencies": (PORT | {"rope_learnable": True}, "rope_learnable is True"),
    "a flag as text": (PORT | {"rope_full_precision": "false"}, "rope_full_precision: Expected `bool`, got `str`"),
    "a flag that is null": (PORT | {"rope_full_precision": None}, "rope_full_precision: Expected `bool`, got `null`"),
    "two types": ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "is 'default' and 'lin"),
    "two bases": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 and 10000.0"),
    "linear without factor": ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs a factor"),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor"),
    "fope scaled by the length of a text": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 8.0, "fope_init_factor": 0.5}}, "rope_type is 'longrope'"
    ),
    "unknown scaling field": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}}, "attention_factor is given"
    ),
    "a name of ours": ({"rope_scaling": {"rope_type": "default", "named_fope": True}}, "unknown field `named_fope`"),
    "two lengths": (
        {"rope_scaling": {"rope_type": "default", "max_position_embeddings": 64}},
        "max_position_embeddings is 64 and 128",
    ),
    "rope type elsewhere": ({"rope_type": "yarn"}, "rope_type is 'yarn'"),
    "part of the channels": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0 is supported"),
    "soft cap": ({"final_logit_softcapping": 30.0}, "unknown field `final_logit_softcapping`"),
    "attention scale": ({"query_pre_attn_scalar": 16}, "unknown field `query_pre_attn_scalar`"),
    "null": ({"tie_word_embeddings": None}, "tie_word_embeddings: Expected `bool`"),
    "text for a number": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: Expected `float`, got `str`"),
    "experts unsaid": ({"model_type": "qwen3_moe"}, "num_experts is not given"),
    "groups of another router": ({"model_type": "qwen3_moe", "router_n_groups": 2} | EXPERTS, "whose router has none"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_implementation_defines_is_refused(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(FopeError, match=message) as caught:
        weight_map_of({"model_type": "llama"} | SIZES | fields)
    assert caught.value.hint


def test_interns_experts_are_normalized_unless_it_is_said(tmp_path: Path) -> None:
    """InternS1ProTextConfig has norm_topk_prob=True."""
    config = config_of("intern_moe_grouped")
    assert config.pop("norm_topk_prob")
    checkpoint = load_checkpoint(write(tmp_path, config, tensors_of("intern_moe_grouped")))
    assert checkpoint.config.experts is not None and checkpoint.config.experts.normalize


def test_the_flags_of_a_published_port() -> None:
    """FoPE-DCLM-376M's, as train_fope.py of github.com/OpenMOSS/rope_pp sets them; D is 46 in its weights."""
    flags = {
        "fourier": True, "fourier_dim": 128, "fourier_init": "eye_xavier_norm", "fourier_init_norm_gain": 0.3,
        "fourier_separate_basis": True, "fourier_separate_head": True, "fourier_learnable": False,
        "fourier_norm": False, "fourier_ignore_zero": True, "rope_init_distribution": "exponential",
        "rope_no_pos": False, "rope_no_rotary": False, "rope_no_repetition": False, "rope_full_precision": True,
        "rope_learnable": False, "rope_include_neg_freq": False, "rope_init_upper_freq": 1.0,
        "rope_init_floor_freq": 0.0, "rope_floor_freq_ratio": 1.0, "rope_upper_freq_ratio": 1.0,
        "rope_clamp_floor_freq": True, "rope_clamp_floor_to_zero": True, "rope_clamp_upper_freq": False,
        "rope_clamp_upper_to_zero": True, "rope_zero_freq_ratio": -1.0, "rope_clamp_to_linear": False,
        "rope_clamp_to_linear_mode": "ceil", "len_extra": False, "init_device": "cuda", "ignore_index": 128001,
    }  # fmt: skip
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    spectrum = weight_map_of({"model_type": "llama"} | SIZES | sizes | flags).config.spectrum
    assert (spectrum.frequencies, spectrum.pairs, spectrum.groups, spectrum.full_precision) == (46, 32, 4, True)
