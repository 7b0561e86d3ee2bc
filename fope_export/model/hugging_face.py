"""Decoders in Hugging Face's layout with FoPE: Llama, Qwen2, Qwen3 and Qwen3-MoE, and the text part of Intern-S1-Pro.

FoPE stands in `rope_scaling` or `rope_parameters`, its coefficients beside the model (one set for all layers; fields
and names of modeling_interns1_pro.py), or in `fourier*` fields and in every layer (ports of the paper's code). Without
either the model is a RoPE one.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from fope_export.config import (
    Channels,
    Checked,
    Count,
    ExpertsConfig,
    Layers,
    ModelConfig,
    Positive,
    Size,
    SpectrumConfig,
    as_written,
    convert,
    tokens_of,
)
from fope_export.errors import CheckpointError, ConfigError
from fope_export.fope import frequencies
from fope_export.fope.spectrum import Spectrum
from fope_export.model.blueprint import Blueprint, Format, join, model_type, read_json

FOPE_FIELDS = ("fope_init_factor", "fope_sep_head", "num_inv_freq")
"""Any of these that is not null makes a model's position embedding FoPE."""


class Kind(msgspec.Struct, frozen=True):
    """What a model type means that its config.json does not say."""

    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: attention_bias decides
    experts: bool = False


KINDS = {
    "llama": Kind(),
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(qk_norm=True),
    "qwen3_moe": Kind(qk_norm=True, experts=True),
    "interns1_pro_text": Kind(qk_norm=True, experts=True),
}
MULTIMODAL = {"interns1_pro": "text_config"}
"""Model types whose language model is described in a section of config.json."""


class HfFlags(Checked, frozen=True, kw_only=True):
    """The fields that decide what is computed. Sizes have no default: the model types' own differ."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Channels | None = None
    max_position_embeddings: Count
    rms_norm_eps: Positive
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    num_experts: Size = 0
    num_experts_per_tok: Size = 0
    moe_intermediate_size: Size = 0
    norm_topk_prob: bool = True
    router_n_groups: int = 0
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[Size] | None = None

    fourier: bool = False
    fourier_separate_head: bool = True
    fourier_norm: bool = False
    fourier_ignore_zero: bool = True
    rope_clamp_floor_freq: bool = True
    rope_clamp_floor_to_zero: bool = True
    rope_full_precision: bool = True

    # Each must have the value that REQUIRED states.
    hidden_act: str = "silu"
    mlp_bias: bool = False
    pretraining_tp: int = 1
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
    "use_sliding_window": False,
    "fourier_norm": False,
    "fourier_ignore_zero": True,
    "rope_clamp_floor_freq": True,
    "rope_clamp_floor_to_zero": True,
}
"""Fields with one supported value."""

WITHOUT_EFFECT = frozenset(
    "architectures attention_dropout auto_map bos_token_id dtype fourier_init fourier_init_norm_gain initializer_range "
    "max_window_layers model_type output_router_logits rope rope_type router_aux_loss_coef sliding_window torch_dtype "
    "transformers_version use_cache _name_or_path".split()
)
"""Fields that change nothing in what a trained model computes, and those that are read elsewhere."""

ROPE_FIELDS = frozenset(("rope_type", "type", "rope_theta", "factor", *FOPE_FIELDS))


class Rope(Checked, frozen=True, kw_only=True):
    """`rope_parameters`, or `rope_scaling` and `rope_theta` of older files."""

    rope_theta: Positive
    rope_type: str = "default"
    factor: Positive = 1.0
    fope_init_factor: float | None = None
    fope_sep_head: bool | None = None
    num_inv_freq: Count | None = None

    @property
    def fope(self) -> bool:
        return any(getattr(self, name) is not None for name in FOPE_FIELDS)


def check(flags: HfFlags, rope: Rope, kind: Kind) -> None:
    """Raises ConfigError naming the first field, or pair of fields, that this layout does not support."""
    for name, supported in REQUIRED.items():
        if (value := getattr(flags, name)) != supported:
            raise ConfigError(
                f"{name} is {value!r}, and only {supported!r} is supported", hint="Open an issue with it."
            )
    odd = [kind for kind in flags.layer_types or () if kind != "full_attention"]
    clashes = {
        f"rope_type is {rope.rope_type!r}, and only 'default' and 'linear' are supported": rope.rope_type
        not in ("default", "linear"),
        f"factor is {rope.factor} with rope_type 'default'": rope.rope_type == "default" and rope.factor != 1.0,
        f"layer_types has {odd[:1]}, and only full_attention is supported": odd,
        "fourier and rope_scaling both describe a FoPE": flags.fourier and rope.fope,
        "num_experts in a model type without experts": flags.num_experts and not kind.experts,
        "num_experts needs num_experts_per_tok and moe_intermediate_size": flags.num_experts
        and not (flags.num_experts_per_tok and flags.moe_intermediate_size),
        "hidden_size is not a multiple of num_attention_heads, and head_dim is not given": not flags.head_dim
        and flags.hidden_size % flags.num_attention_heads,
    }
    for message, clash in clashes.items():
        if clash:
            raise ConfigError(message, hint="Check config.json against the training run's.")
    _check_quantization(flags.quantization_config)


def _check_quantization(config: Mapping[str, Any] | None) -> None:
    wanted = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name, value in wanted.items() if config is not None else ():
        if (found := (config or {}).get(name)) != value:
            raise ConfigError(
                f"quantization_config.{name} is {found!r}, and only {value!r} is supported",
                hint="Convert the checkpoint to bfloat16 first.",
            )


def spectrum_of(flags: HfFlags, rope: Rope) -> tuple[SpectrumConfig, Tensor, Spectrum | None]:
    """The spectrum's configuration, its frequencies, and the whole of it where no coefficients are stored."""
    head_dim = flags.head_dim or flags.hidden_size // flags.num_attention_heads
    freq = frequencies.exponential(rope.rope_theta, head_dim) / rope.factor
    if not (rope.fope or flags.fourier):
        whole = Spectrum.rope(freq.numpy(), head_dim)
        return msgspec.structs.replace(whole.config, full_precision=False), freq, whole
    slowest = 2 * math.pi / flags.max_position_embeddings
    if rope.num_inv_freq is not None:
        freq = freq[: rope.num_inv_freq]
    else:  # the paper's code keeps a frequency of exactly one period, Intern-S1-Pro's does not
        freq = freq[freq >= slowest] if flags.fourier else freq[freq > slowest]
    separate = flags.fourier_separate_head if flags.fourier else bool(rope.fope_sep_head)
    config = SpectrumConfig(
        head_dim=head_dim,
        rotary_dim=head_dim,
        frequencies=len(freq),
        pairs=min(len(freq), head_dim // 4) if flags.fourier else len(freq),
        groups=flags.num_key_value_heads if separate else 1,
        sin_pad=1.0,
        cos_pad=1.0,
        sign=1,
        pairing="half",
        full_precision=flags.rope_full_precision if flags.fourier else False,
    )
    return config, freq, None


def model_config(flags: HfFlags, kind: Kind, rope: Rope, spectrum: SpectrumConfig) -> ModelConfig:
    """The decoder's sizes."""
    return ModelConfig(
        vocab_size=flags.vocab_size,
        hidden_size=flags.hidden_size,
        intermediate_size=flags.intermediate_size,
        num_layers=flags.num_hidden_layers,
        num_heads=flags.num_attention_heads,
        num_kv_heads=flags.num_key_value_heads,
        norm_eps=flags.rms_norm_eps,
        tie_embeddings=flags.tie_word_embeddings,
        training_length=flags.max_position_embeddings,
        rope_theta=rope.rope_theta,
        floored=False,
        eos_token_id=as_written(tokens_of(flags.eos_token_id)),
        pad_token_id=flags.pad_token_id,
        spectrum=spectrum,
        qk_norm=kind.qk_norm,
        qkv_bias=flags.attention_bias if kind.qkv_bias is None else kind.qkv_bias,
        out_bias=flags.attention_bias if kind.qkv_bias is None else False,
        experts=_experts(flags),
    )


def _experts(flags: HfFlags) -> ExpertsConfig | None:
    step, dense = flags.decoder_sparse_step, set(flags.mlp_only_layers or ())
    layers = tuple(i for i in range(flags.num_hidden_layers) if (i + 1) % step == 0 and i not in dense)
    if not flags.num_experts or not layers:
        return None
    return ExpertsConfig(
        count=flags.num_experts,
        per_token=flags.num_experts_per_tok,
        intermediate_size=flags.moe_intermediate_size,
        groups=max(flags.router_n_groups, 1),
        normalize=flags.norm_topk_prob,
        layers=layers,
    )


def blueprint(flags: HfFlags, rope: Rope, kind: Kind, prefix: str) -> Blueprint:
    """The decoder of `flags`, its tensors found under `prefix`."""
    check(flags, rope, kind)
    spectrum, freq, whole = spectrum_of(flags, rope)
    config = model_config(flags, kind, rope, spectrum)
    sources: dict[str, tuple[str, ...]] = {
        "embed.weight": (f"{prefix}embed_tokens.weight",),
        "norm.weight": (f"{prefix}norm.weight",),
    }
    if not config.tie_embeddings:
        sources["lm_head.weight"] = ("lm_head.weight",)
    constants: dict[str, Tensor] = {}
    checksums = {f"{prefix}rotary_emb.inv_freq": freq}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"{prefix}layers.{i}"
        sources |= {f"{ours}.{name}": stored for name, stored in _layer(config, i, theirs).items()}
        rotary, shared = f"{ours}.attention.rotary", not flags.fourier
        embedding = f"{prefix}rotary_emb" if shared else f"{theirs}.self_attn.rotary_emb"
        checksums[f"{theirs}.self_attn.rotary_emb.inv_freq"] = freq
        constants[f"{rotary}.freq"] = freq if whole is None else torch.from_numpy(whole.freq)
        for name in ("sin_coef", "cos_coef"):
            if whole is not None:
                constants[f"{rotary}.{name}"] = torch.from_numpy(getattr(whole, name))
            else:
                sources[f"{rotary}.{name}"] = (f"{embedding}.{name}",)
    return Blueprint(config, sources, constants, partial(_adapt, config), checksums)


def _layer(config: ModelConfig, i: int, stored: str) -> dict[str, tuple[str, ...]]:
    """The tensors of layer `i`, without its position embedding, and what they are made of under `stored`."""
    sources: dict[str, tuple[str, ...]] = {
        "attn_norm.weight": (f"{stored}.input_layernorm.weight",),
        "ff_norm.weight": (f"{stored}.post_attention_layernorm.weight",),
    }
    for kind, wanted in (("weight", True), ("bias", config.qkv_bias)):
        if wanted:
            sources[f"attention.att_proj.{kind}"] = tuple(f"{stored}.self_attn.{x}_proj.{kind}" for x in "qkv")
    for kind, wanted in (("weight", True), ("bias", config.out_bias)):
        if wanted:
            sources[f"attention.attn_out.{kind}"] = (f"{stored}.self_attn.o_proj.{kind}",)
    if config.qk_norm:
        sources |= {f"attention.{x}_norm.weight": (f"{stored}.self_attn.{x}_norm.weight",) for x in "qk"}
    mlp = f"{stored}.mlp"
    if config.experts and i in config.experts.layers:
        each = [f"{mlp}.experts.{e}" for e in range(config.experts.count)]
        return sources | {
            "feed_forward.router.weight": (f"{mlp}.gate.weight",),
            "feed_forward.proj": tuple(f"{e}.{x}_proj.weight" for e in each for x in ("up", "gate")),
            "feed_forward.out": tuple(f"{e}.down_proj.weight" for e in each),
        }
    return sources | {
        "feed_forward.ff_proj.weight": tuple(f"{mlp}.{x}_proj.weight" for x in ("up", "gate")),
        "feed_forward.ff_out.weight": (f"{mlp}.down_proj.weight",),
    }


def _adapt(config: ModelConfig, name: str, tensors: list[Tensor]) -> Tensor:
    if name.endswith(("feed_forward.proj", "feed_forward.out")):
        assert config.experts
        return torch.stack([part.T for part in join(tensors).chunk(config.experts.count)]).contiguous()
    if name.endswith("_coef") and config.spectrum.groups == 1 and tensors[0].ndim == 2:
        return tensors[0][None]
    return join(tensors)


def _plan(folder: Path) -> Blueprint:
    path = folder / "config.json"
    data = read_json(path)
    where, prefix, kind = str(path), "model.", data.get("model_type")
    if section := MULTIMODAL.get(str(kind)):
        inner = data.get(section)
        if not isinstance(inner, dict):
            raise CheckpointError(f"{path}: no {section}", hint="Is the file complete?")
        where, prefix, kind = f"{path}: {section}", "model.language_model.", inner.get("model_type")
        data = {"quantization_config": data.get("quantization_config")} | inner
    if kind not in KINDS:
        raise ConfigError(f"{where}: model_type is {kind!r}", hint=f"One of: {', '.join(KINDS)}.")
    fields = {name: value for name, value in data.items() if name not in WITHOUT_EFFECT}
    flags = convert(fields, HfFlags, where=where)
    try:
        return blueprint(flags, _rope(flags, where), KINDS[kind], prefix)
    except ConfigError as cause:
        raise ConfigError(f"{where}: {cause}", hint=cause.hint) from cause


def _rope(flags: HfFlags, where: str) -> Rope:
    """One description out of the two places where Hugging Face's versions keep it."""
    if flags.rope_scaling and flags.rope_parameters:
        raise ConfigError("rope_scaling and rope_parameters are both given", hint="Keep the one that training used.")
    given = dict(flags.rope_parameters or flags.rope_scaling or {})
    if "type" in given:
        given.setdefault("rope_type", given.pop("type"))
    given.setdefault("rope_theta", flags.rope_theta)
    return convert(given, Rope, where=f"{where}: rope_parameters")


def _recognise(folder: Path) -> bool:
    return model_type(folder) in KINDS.keys() | MULTIMODAL.keys()


def _foreign(name: str) -> bool:
    """Whether a tensor belongs to the vision or another encoder of a multimodal model."""
    return name.startswith("model.") and name.split(".")[1] in (
        "visual",
        "vision_tower",
        "time_series",
        "multi_modal_projector",
    )


def _tensor_name(name: str) -> str:
    """Ports of the paper's code keep its name of the embedding."""
    return name.replace(".self_attn.pos_emb.", ".self_attn.rotary_emb.")


HUGGING_FACE = Format(
    name="hugging_face",
    evidence=f"config.json with model_type {', '.join((*KINDS, *MULTIMODAL))}",
    weights=("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    recognise=_recognise,
    plan=_plan,
    tensor_name=_tensor_name,
    foreign=_foreign,
)
