"""Decoders in Hugging Face's layout with FoPE: Llama, Qwen2, Qwen3 and Qwen3-MoE, the text parts of Qwen3-VL and
Intern-S1-Pro.

FoPE stands in `rope_scaling` or `rope_parameters`, its coefficients beside the model (one set for all layers; fields
and names of modeling_interns1_pro.py), or in the paper's flags and in every layer (ports of the paper's code). Without
either the model is a RoPE one.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fope_export.config import ExpertsConfig, ModelConfig, SpectrumConfig, as_written, convert, tokens_of
from fope_export.errors import CheckpointError, ConfigError
from fope_export.model.experts import interleaved
from fope_export.model.fp8 import Fp8
from fope_export.model.layouts import hf_fields, hf_rope, paper
from fope_export.model.layouts.base import (
    CONFIG,
    Layout,
    Pieces,
    Positions,
    Shapes,
    WeightMap,
    join,
    model_type,
    read_json,
    without_clashes,
)
from fope_export.model.layouts.hf_fields import KINDS, LACKING, MULTIMODAL, HfFlags, Kind, fields_of
from fope_export.model.layouts.hf_rope import Rope, rope_of
from fope_export.model.layouts.paper import PaperFlags

MODEL = "model."
"""What stands before the names of a decoder's tensors, but its head's."""
EXPERTS = ("gate_up_proj", "down_proj")
"""All experts' weights in two tensors."""


INSIDE = re.compile(r"(^|\.)(?:model\.language_model|language_model\.model)\.")
"""Where multimodal models keep their decoder."""


def _tensor_name(name: str) -> str:
    """As a decoder that stands alone has it; ports of the paper's code keep its name of the embedding."""
    name = INSIDE.sub(rf"\1{MODEL}", name.replace(".self_attn.pos_emb.", ".self_attn.rotary_emb."))
    return re.sub(r"(^|\.)language_model\.lm_head\.", r"\1lm_head.", name)


def check(flags: HfFlags, rope: Rope, port: PaperFlags | None, kind: Kind) -> None:
    """Raises ConfigError naming the first field, or pair of fields, that this layout does not support."""
    hf_fields.check(flags, kind)
    without_clashes(
        {
            "fourier and rope_scaling both describe the position embedding": port
            and (rope.fope or rope.rope_type != "default")
        }
    )
    hf_rope.check(rope, flags.channels, kind.turns)
    if port:
        paper.check(port)


def positions_of(flags: HfFlags, rope: Rope, port: PaperFlags | None, kind: Kind, stored: Shapes) -> Positions:
    """The position embedding of every layer; of what the configuration leaves open, the `stored` coefficients tell."""
    sizes = {"head_dim": flags.channels, "length": flags.max_position_embeddings}
    if port:
        coef = _coef(stored, f"{MODEL}layers.0.self_attn.rotary_emb")
        heads = {flags.num_key_value_heads, flags.num_attention_heads}
        groups = coef[0] if len(coef) == 3 and coef[0] in heads else flags.num_key_value_heads
        return paper.positions(port, groups=groups, **sizes)
    coef = _coef(stored, f"{MODEL}rotary_emb")
    known = coef[-2] if len(coef) > 1 else None
    return hf_rope.positions(rope, groups=flags.num_key_value_heads, stored=known, turns=kind.turns, **sizes)


def _coef(stored: Shapes, embedding: str) -> tuple[int, ...]:
    names = (f"{embedding}.{name}" for name in ("sin_coef", "fourier_coef"))
    return next((stored[name] for name in names if name in stored), ())


def model_config(flags: HfFlags, kind: Kind, rope: Rope, spectrum: SpectrumConfig) -> ModelConfig:
    """The decoder's sizes. Where every query head has coefficients of its own, every one has a key head of its own."""
    return ModelConfig(
        vocab_size=flags.vocab_size,
        hidden_size=flags.hidden_size,
        intermediate_size=flags.intermediate_size,
        num_layers=flags.num_hidden_layers,
        num_heads=flags.num_attention_heads,
        num_kv_heads=max(flags.num_key_value_heads, spectrum.groups),
        norm_eps=flags.rms_norm_eps,
        tie_embeddings=flags.tie_word_embeddings,
        training_length=flags.max_position_embeddings,
        rope_theta=rope.rope_theta,
        floored=False,
        eos_token_id=as_written(tokens_of(flags.eos_token_id)),
        pad_token_id=flags.pad,
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


def weight_map(flags: HfFlags, rope: Rope, port: PaperFlags | None, kind: Kind, stored: Shapes) -> WeightMap:
    """The decoder of `flags`; `stored` are the tensors there are, which decide between ways of storing the same."""
    check(flags, rope, port, kind)
    positions = positions_of(flags, rope, port, kind, stored)
    config = model_config(flags, kind, rope, positions.config)
    embed = f"{MODEL}embed_tokens.weight"
    sources: dict[str, tuple[str, ...]] = {"embed.weight": (embed,), "norm.weight": (f"{MODEL}norm.weight",)}
    if not config.tie_embeddings:
        sources["lm_head.weight"] = ("lm_head.weight",)
    constants: dict[str, Tensor] = {}
    checksums = {f"{MODEL}rotary_emb.inv_freq": positions.inv_freq}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"{MODEL}layers.{i}"
        sources |= {f"{ours}.{name}": names for name, names in _layer(config, i, theirs, stored).items()}
        rotary, own = f"{ours}.attention.rotary", f"{theirs}.self_attn.rotary_emb"
        constants |= positions.constants(rotary)
        sources |= positions.sources(rotary, own if port else f"{MODEL}rotary_emb")
        checksums[f"{own}.inv_freq"] = positions.inv_freq
    return WeightMap(
        config,
        sources,
        constants,
        partial(_adapt, config, flags, kind, positions),
        checksums,
        copies={"lm_head.weight": embed} if config.tie_embeddings else {},
        fp8=None if flags.quantization_config is None else Fp8.of(flags.quantization_config, _tensor_name),
        split=positions.split,
        reading=positions.reading,
        pieces=partial(_pieces, config.num_kv_heads != flags.num_key_value_heads, sources),
    )


def _layer(config: ModelConfig, i: int, name: str, stored: Shapes) -> dict[str, tuple[str, ...]]:
    """The tensors of layer `i`, without its position embedding, and what they are made of under `name`."""
    sources: dict[str, tuple[str, ...]] = {
        "attn_norm.weight": (f"{name}.input_layernorm.weight",),
        "ff_norm.weight": (f"{name}.post_attention_layernorm.weight",),
    }
    for kind, wanted in (("weight", True), ("bias", config.qkv_bias)):
        if wanted:
            sources[f"attention.att_proj.{kind}"] = tuple(f"{name}.self_attn.{x}_proj.{kind}" for x in "qkv")
    for kind, wanted in (("weight", True), ("bias", config.out_bias)):
        if wanted:
            sources[f"attention.attn_out.{kind}"] = (f"{name}.self_attn.o_proj.{kind}",)
    if config.qk_norm:
        sources |= {f"attention.{x}_norm.weight": (f"{name}.self_attn.{x}_norm.weight",) for x in "qk"}
    mlp = f"{name}.mlp"
    if config.experts and i in config.experts.layers:
        return sources | _layer_experts(config.experts.count, mlp, stored)
    return sources | {
        "feed_forward.ff_proj.weight": tuple(f"{mlp}.{x}_proj.weight" for x in ("up", "gate")),
        "feed_forward.ff_out.weight": (f"{mlp}.down_proj.weight",),
    }


def _layer_experts(count: int, mlp: str, stored: Shapes) -> dict[str, tuple[str, ...]]:
    router: dict[str, tuple[str, ...]] = {"feed_forward.router.weight": (f"{mlp}.gate.weight",)}
    fused = [f"{mlp}.experts.{name}" for name in EXPERTS]
    if all(name in stored for name in fused):
        return router | {"feed_forward.proj": (fused[0],), "feed_forward.out": (fused[1],)}
    each = [f"{mlp}.experts.{e}" for e in range(count)]
    return router | {
        "feed_forward.proj": tuple(f"{e}.{x}_proj.weight" for e in each for x in ("gate", "up")),
        "feed_forward.out": tuple(f"{e}.down_proj.weight" for e in each),
    }


OF_AN_EXPERT = {"proj": 2, "out": 1}
"""Our two tensors of a mixture's layer -> how many stored ones make an expert's part, where each has its own."""


def _pieces(repeated: bool, sources: Mapping[str, tuple[str, ...]], name: str) -> Pieces:
    """With `repeated` key-value heads, each stands for several."""
    if name.endswith("_coef") or (repeated and ".att_proj." in name):
        return Pieces.WHOLE
    apart = name.rpartition("feed_forward.")[2] in OF_AN_EXPERT and not sources[name][0].endswith(EXPERTS)
    return Pieces.STACKED if apart else Pieces.ROWS


def _adapt(
    config: ModelConfig, flags: HfFlags, kind: Kind, positions: Positions, name: str, tensors: list[Tensor]
) -> Tensor:
    if name.endswith("_coef"):
        return positions.adapt(tensors[0])
    if each := OF_AN_EXPERT.get(name.rpartition("feed_forward.")[2]):
        if tensors[0].ndim == 2:
            parts = [torch.stack(tensors[i::each]) for i in range(each)]
        else:
            parts = [*(tensors[0].transpose(1, 2) if kind.fused_in_out else tensors[0]).chunk(each, dim=1)]
        return interleaved(*parts) if each == OF_AN_EXPERT["proj"] else parts[0].contiguous()
    if ".att_proj." in name and config.num_kv_heads != flags.num_key_value_heads:
        q, *others = tensors
        repeats = config.num_kv_heads // flags.num_key_value_heads
        return join(
            [q, *(x.unflatten(0, (-1, flags.channels)).repeat_interleave(repeats, 0).flatten(0, 1) for x in others)]
        )
    return join(tensors)


def _read(folder: Path) -> WeightMap:
    path = folder / CONFIG
    data = read_json(path)
    where, kind = str(path), data.get("model_type")
    if (section := MULTIMODAL.get(str(kind))) and kind not in LACKING:
        inner = data.get(section)
        if not isinstance(inner, dict):
            raise CheckpointError(f"{path}: no {section}", hint="Is the file complete?")
        where, kind = f"{path}: {section}", inner.get("model_type")
        shared = ("quantization_config", "tie_word_embeddings")
        data = {name: data[name] for name in shared if data.get(name) is not None} | inner
    if lacking := LACKING.get(str(kind)):
        raise ConfigError(f"{where}: model_type is {kind!r}, which needs {lacking}", hint="It cannot be exported yet.")
    if kind not in KINDS:
        raise ConfigError(f"{where}: model_type is {kind!r}", hint=f"One of: {', '.join(KINDS)}.")
    return weight_map_of(data, where)


def weight_map_of(data: Mapping[str, Any], where: str = CONFIG) -> WeightMap:
    """The decoder that the fields of a config.json describe."""
    try:
        flags, given = fields_of(data, where)
        repeated = ("rope_theta", "partial_rotary_factor", "max_position_embeddings")
        beside = {name: getattr(flags, name) for name in repeated}
        rope = rope_of(flags.rope_parameters, flags.rope_scaling, beside, where)
        described = (flags, rope, _port(given, rope.rope_theta, where), KINDS[data["model_type"]])
        return replace(weight_map(*described, {}), fitted=partial(weight_map, *described))
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


def _recognize(folder: Path) -> bool:
    return model_type(folder) in KINDS.keys() | MULTIMODAL.keys() | LACKING.keys()


OTHERS = frozenset("visual vision_model vision_tower time_series audio_tower multi_modal_projector mlp1 mtp".split())
"""Parts of a multimodal model beside its decoder."""


def _foreign(name: str) -> bool:
    """Whether a tensor belongs to the vision or another encoder of a multimodal model."""
    return not OTHERS.isdisjoint(name.removeprefix(MODEL).split(".")[:1])


LAYOUT = Layout(
    evidence=f"config.json with model_type {', '.join((*KINDS, *MULTIMODAL))}",
    configuration=CONFIG,
    weights=("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    recognize=_recognize,
    read=_read,
    tensor_name=_tensor_name,
    foreign=_foreign,
)
