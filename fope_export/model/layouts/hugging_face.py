"""Decoders in Hugging Face's layout with FoPE: Llama, Qwen2, Qwen3 and Qwen3-MoE, and the text part of Intern-S1-Pro.

FoPE stands in `rope_scaling` or `rope_parameters`, its coefficients beside the model (one set for all layers; fields
and names of modeling_interns1_pro.py), or in the paper's flags and in every layer (ports of the paper's code). Without
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
from fope_export.model.fp8 import Fp8
from fope_export.model.layouts import paper
from fope_export.model.layouts.base import (
    CONFIG,
    Layout,
    Pieces,
    Positions,
    WeightMap,
    join,
    model_type,
    only_supported,
    read_json,
    without_clashes,
)
from fope_export.model.layouts.paper import PaperFlags

FOPE_FIELDS = ("fope_init_factor", "fope_sep_head", "num_inv_freq")
"""Any of these that is not null makes a model's position embedding FoPE."""


class Kind(msgspec.Struct, frozen=True):
    """What a model type means that its config.json does not say."""

    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: attention_bias decides
    experts: bool = False
    groups: bool = False  # its router knows router_n_groups
    silent: dict[str, Any] = {}  # the class's own values of fields that are left out


KINDS = {
    "llama": Kind(),
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(qk_norm=True, silent={"head_dim": 128}),
    "qwen3_moe": Kind(qk_norm=True, experts=True, silent={"norm_topk_prob": False}),
    "interns1_pro_text": Kind(qk_norm=True, experts=True, groups=True, silent={"norm_topk_prob": True}),
}
MULTIMODAL = {"interns1_pro": "text_config"}
"""Model types whose language model is described in a section of config.json."""


class HfFlags(Checked, frozen=True, kw_only=True):
    """The fields that decide what is computed. A default is that of every model type; where these differ, `Kind.silent`
    has theirs, or the field is required, as sizes are.
    """

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

    num_experts: Size | None = None
    num_experts_per_tok: Size = 0
    moe_intermediate_size: Size = 0
    norm_topk_prob: bool = False
    router_n_groups: int = 0
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[Size] | None = None

    # Each must have the value that REQUIRED states.
    hidden_act: str = "silu"
    mlp_bias: bool = False
    pretraining_tp: int = 1
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    rope_type: str | None = None
    quantization_config: dict[str, Any] | None = None


REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_sliding_window": (False,),
    "rope_type": ("default", None),
}
"""Fields with one supported value."""

WITHOUT_EFFECT = frozenset(
    "architectures attention_dropout auto_map bos_token_id dtype gradient_checkpointing ignore_index init_device "
    "initializer_range max_window_layers model_type output_router_logits router_aux_loss_coef sliding_window "
    "torch_dtype transformers_version use_cache _name_or_path".split()
)
"""Fields that change nothing in what a trained model computes, and those that are read elsewhere."""

PAPER_FIELDS = frozenset(PaperFlags.__struct_fields__) - {"rope_theta"}
"""Fields that only ports of the paper's code have: any of them makes a model one."""


class Rope(Checked, frozen=True, kw_only=True):
    """`rope_parameters`, or `rope_scaling` and `rope_theta` of older files."""

    rope_theta: Positive
    rope_type: str = "default"
    factor: Positive | None = None
    fope_init_factor: float | None = None
    fope_sep_head: bool | None = None
    num_inv_freq: Count | None = None

    @property
    def fope(self) -> bool:
        return any(getattr(self, name) is not None for name in FOPE_FIELDS)


def check(flags: HfFlags, rope: Rope, port: PaperFlags | None, kind: Kind) -> None:
    """Raises ConfigError naming the first field, or pair of fields, that this layout does not support."""
    only_supported(flags, REQUIRED)
    odd = [kind for kind in flags.layer_types or () if kind != "full_attention"]
    without_clashes(
        {
            "fourier and rope_scaling both describe the position embedding": port
            and (rope.fope or rope.rope_type != "default"),
            f"rope_type is {rope.rope_type!r}, and only 'default' and 'linear' are supported": rope.rope_type
            not in ("default", "linear"),
            f"factor is {rope.factor} with rope_type 'default'": rope.rope_type == "default"
            and rope.factor not in (None, 1.0),
            "rope_type 'linear' needs a factor": rope.rope_type == "linear" and rope.factor is None,
            f"layer_types has {odd[:1]}, and only full_attention is supported": odd,
            "hidden_size is not a multiple of num_attention_heads, and head_dim is not given": not flags.head_dim
            and flags.hidden_size % flags.num_attention_heads,
        }
    )
    _check_experts(flags, kind)
    if port:
        paper.check(port)


def _check_experts(flags: HfFlags, kind: Kind) -> None:
    without_clashes(
        {
            "num_experts in a model type without experts": flags.num_experts and not kind.experts,
            "num_experts is not given": kind.experts and flags.num_experts is None,
            "num_experts needs num_experts_per_tok and moe_intermediate_size": flags.num_experts
            and not (flags.num_experts_per_tok and flags.moe_intermediate_size),
            "router_n_groups in a model type whose router has none": flags.router_n_groups > 1 and not kind.groups,
        }
    )


def positions_of(flags: HfFlags, rope: Rope, port: PaperFlags | None) -> Positions:
    """The position embedding of every layer."""
    head_dim, length = flags.head_dim or flags.hidden_size // flags.num_attention_heads, flags.max_position_embeddings
    if port:
        return paper.positions(port, head_dim=head_dim, groups=flags.num_key_value_heads, length=length)
    freq = frequencies.exponential(rope.rope_theta, head_dim) / (rope.factor or 1.0)
    if not rope.fope:
        whole = Spectrum.rope(freq.numpy(), head_dim)
        return Positions(msgspec.structs.replace(whole.config, full_precision=False), freq, freq, whole=whole)
    # The paper's code keeps a frequency of exactly one period, Intern-S1-Pro's does not.
    freq = freq[freq > 2 * math.pi / length] if rope.num_inv_freq is None else freq[: rope.num_inv_freq]
    config = SpectrumConfig(
        head_dim=head_dim,
        rotary_dim=head_dim,
        frequencies=len(freq),
        pairs=len(freq),
        groups=flags.num_key_value_heads if rope.fope_sep_head else 1,
        sin_pad=1.0,
        cos_pad=1.0,
        sign=1,
        pairing="half",
        full_precision=False,
    )
    return Positions(config, freq, freq, adapt=lambda coef: coef if rope.fope_sep_head else coef[None])


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


def weight_map(flags: HfFlags, rope: Rope, port: PaperFlags | None, kind: Kind, prefix: str) -> WeightMap:
    """The decoder of `flags`, its tensors found under `prefix`."""
    check(flags, rope, port, kind)
    positions = positions_of(flags, rope, port)
    config = model_config(flags, kind, rope, positions.config)
    embed = f"{prefix}embed_tokens.weight"
    sources: dict[str, tuple[str, ...]] = {"embed.weight": (embed,), "norm.weight": (f"{prefix}norm.weight",)}
    if not config.tie_embeddings:
        sources["lm_head.weight"] = ("lm_head.weight",)
    constants: dict[str, Tensor] = {}
    checksums = {f"{prefix}rotary_emb.inv_freq": positions.inv_freq}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"{prefix}layers.{i}"
        sources |= {f"{ours}.{name}": stored for name, stored in _layer(config, i, theirs).items()}
        rotary, own = f"{ours}.attention.rotary", f"{theirs}.self_attn.rotary_emb"
        constants |= positions.constants(rotary)
        sources |= positions.sources(rotary, own if port else f"{prefix}rotary_emb")
        checksums[f"{own}.inv_freq"] = positions.inv_freq
    return WeightMap(
        config,
        sources,
        constants,
        partial(_adapt, positions),
        checksums,
        copies={"lm_head.weight": embed} if config.tie_embeddings else {},
        fp8=None if flags.quantization_config is None else Fp8.of(flags.quantization_config),
        pieces=_pieces,
    )


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


OF_AN_EXPERT = {"proj": 2, "out": 1}
"""Our two tensors of a mixture's layer -> how many stored ones make an expert's part of each."""


def _pieces(name: str) -> Pieces:
    if name.rpartition("feed_forward.")[2] in OF_AN_EXPERT:
        return Pieces.STACKED
    return Pieces.WHOLE if name.endswith("_coef") else Pieces.ROWS


def _adapt(positions: Positions, name: str, tensors: list[Tensor]) -> Tensor:
    if each := OF_AN_EXPERT.get(name.rpartition("feed_forward.")[2]):
        return torch.stack([join(tensors[i : i + each]).T for i in range(0, len(tensors), each)]).contiguous()
    return positions.adapt(tensors[0]) if name.endswith("_coef") else join(tensors)


def _read(folder: Path) -> WeightMap:
    path = folder / CONFIG
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
    return weight_map_of(data, where, prefix)


def weight_map_of(data: Mapping[str, Any], where: str = CONFIG, prefix: str = "model.") -> WeightMap:
    """The decoder that the fields of a config.json describe, its tensors found under `prefix`."""
    kind = KINDS[data["model_type"]]
    fields = kind.silent | {name: value for name, value in data.items() if name not in WITHOUT_EFFECT}
    port = {name: fields.pop(name) for name in sorted(PAPER_FIELDS & fields.keys())}
    flags = convert(fields, HfFlags, where=where)
    try:
        rope = _rope(flags, where)
        return weight_map(flags, rope, _port(port, rope.rope_theta, where), kind, prefix)
    except ConfigError as cause:
        message = str(cause)
        raise ConfigError(message if message.startswith(where) else f"{where}: {cause}", hint=cause.hint) from cause


def _port(given: Mapping[str, Any], theta: float, where: str) -> PaperFlags | None:
    """The paper's flags, where a port of its code has any; silent about the floor, FoPE has one (D tells)."""
    if not given:
        return None
    floor = dict.fromkeys(("rope_clamp_floor_freq", "rope_clamp_floor_to_zero"), given.get("fourier", False))
    known: dict[str, Any] = {"rope": True, "rope_theta": theta}
    return convert(known | floor | dict(given), PaperFlags, where=where)


def _rope(flags: HfFlags, where: str) -> Rope:
    """One description out of the two places where Hugging Face's versions keep it."""
    if flags.rope_scaling and flags.rope_parameters:
        raise ConfigError("rope_scaling and rope_parameters are both given", hint="Keep the one that training used.")
    given = dict(flags.rope_parameters or flags.rope_scaling or {})
    for name, other in (("rope_type", given.pop("type", None)), ("rope_theta", flags.rope_theta)):
        if other is not None and given.setdefault(name, other) != other:
            raise ConfigError(
                f"{name} is {given[name]!r} and {other!r}", hint="Two fields say it: keep the one that training used."
            )
    return convert(given, Rope, where=f"{where}: rope_parameters")


def _recognize(folder: Path) -> bool:
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


LAYOUT = Layout(
    evidence=f"config.json with model_type {', '.join((*KINDS, *MULTIMODAL))}",
    configuration=CONFIG,
    weights=("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    recognize=_recognize,
    read=_read,
    tensor_name=_tensor_name,
    foreign=_foreign,
)
