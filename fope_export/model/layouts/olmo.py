"""The paper's repository (an OLMo fork): `config.yaml` and `model.pt`.

Flags, defaults, order of operations and tensor names follow olmo/config.py and olmo/model.py of that repository.
"""

import base64
import io
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fope_export.config import Count, Layers, ModelConfig, Positive, SpectrumConfig, convert
from fope_export.documents import read_yaml
from fope_export.errors import CheckpointError, ConfigError
from fope_export.model.layouts import paper
from fope_export.model.layouts.base import (
    Layout,
    Pieces,
    Positions,
    WeightMap,
    join,
    only_supported,
    without_clashes,
)
from fope_export.model.layouts.paper import PaperFlags

FILE = "config.yaml"


class OlmoFlags(PaperFlags, frozen=True, kw_only=True):
    """Every field of the fork's ModelConfig with its default; an omitted field means the default."""

    d_model: Count = 768
    n_heads: Count = 12
    n_kv_heads: Count | None = None
    multi_query_attention: bool | None = None
    n_layers: Layers = 12
    mlp_ratio: Count = 4
    mlp_hidden_size: Count | None = None
    vocab_size: Count = 50257
    embedding_size: Count | None = 50304
    weight_tying: bool = True
    eos_token_id: int | None = 50256
    pad_token_id: int | None = 50256
    max_sequence_length: Count = 1024
    layer_norm_eps: Positive = 1e-5
    pos_emb: bool = True

    # Each must have the value that REQUIRED states.
    activation_type: str = "swiglu"
    block_type: str = "sequential"
    block_group_size: int = 1
    layer_norm_type: str = "default"
    layer_norm_with_affine: bool = True
    include_bias: bool = True
    bias_for_layer_norm: bool | None = None
    alibi: bool = False
    attention_layer_norm: bool = False
    attention_layer_norm_v: bool = False
    attention_layer_norm_out: bool = False
    embedding_layer_norm: bool = False
    clip_qkv: float | None = None
    scale_logits: bool = False
    norm_after: bool = False

    # Without effect on what a trained model computes: initialization, dropout, kernels, and flags the code never reads.
    debug: bool = False
    alibi_bias_max: float = 8.0
    flash_attention: bool = False
    freqwise_attention: bool = False
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    attention_layer_norm_with_affine: bool = True
    init_device: str | None = None
    init_fn: str = "normal"
    init_std: float = 0.02
    init_cutoff_factor: float | None = None
    precision: str | None = None
    scale_emb_init: bool = False
    emb_init_std: float | None = None


REQUIRED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("swiglu",),
    "block_type": ("sequential",),
    "block_group_size": (1,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "include_bias": (False,),
    "bias_for_layer_norm": (False, None),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "attention_layer_norm_v": (False,),
    "attention_layer_norm_out": (False,),
    "embedding_layer_norm": (False,),
    "clip_qkv": (None,),
    "scale_logits": (False,),
    "norm_after": (False,),
}
"""Flags that no published model changes, and the values this layout supports."""


def check(flags: OlmoFlags) -> None:
    """Raises ConfigError naming the first flag, or pair of flags, that this layout does not support."""
    only_supported(flags, REQUIRED)
    paper.check(flags)
    without_clashes(
        {
            "d_model is not a multiple of n_heads": flags.d_model % flags.n_heads,
            "rope needs pos_emb": flags.rope and not flags.pos_emb,
            "pos_emb without rope is a table of learned positions, which is not supported": flags.pos_emb
            and not flags.rope,
            "n_kv_heads below n_heads needs fourier_separate_head: false": flags.fourier
            and flags.fourier_separate_head
            and kv_heads(flags) != flags.n_heads,
        }
    )


def kv_heads(flags: OlmoFlags) -> int:
    """n_kv_heads with its two older spellings."""
    return flags.n_kv_heads or (1 if flags.multi_query_attention else flags.n_heads)


def model_config(flags: OlmoFlags, spectrum: SpectrumConfig) -> ModelConfig:
    """The decoder's sizes. A special token outside the vocabulary can never occur, and is none."""
    vocab = flags.embedding_size or flags.vocab_size
    eos, pad = (
        token if token is not None and 0 <= token < vocab else None
        for token in (flags.eos_token_id, flags.pad_token_id)
    )
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=flags.d_model,
        intermediate_size=(flags.mlp_hidden_size or flags.mlp_ratio * flags.d_model) // 2,
        num_layers=flags.n_layers,
        num_heads=flags.n_heads,
        num_kv_heads=kv_heads(flags),
        norm_eps=flags.layer_norm_eps,
        tie_embeddings=flags.weight_tying,
        training_length=flags.max_sequence_length,
        rope_theta=None,
        floored=flags.rope_clamp_floor_freq,
        eos_token_id=eos,
        pad_token_id=pad,
        spectrum=spectrum,
    )


def weight_map(flags: OlmoFlags, prefix: str = "") -> WeightMap:
    """The decoder of `flags`, its tensors found under `prefix`."""
    check(flags)
    positions = paper.positions(
        flags, head_dim=flags.d_model // flags.n_heads, groups=flags.n_heads, length=flags.max_sequence_length
    )
    embed, head = f"{prefix}transformer.wte.weight", f"{prefix}transformer.ff_out.weight"
    sources: dict[str, tuple[str, ...]] = {
        "embed.weight": (embed,),
        "norm.weight": (f"{prefix}transformer.ln_f.weight",),
    }
    if not flags.weight_tying:
        sources["lm_head.weight"] = (head,)
    constants: dict[str, Tensor] = {}
    for i in range(flags.n_layers):
        ours, theirs = f"layers.{i}", f"{prefix}transformer.blocks.{i}"
        for module, names in LAYER_TENSORS.items():
            sources |= {f"{ours}.{module}{name}.weight": (f"{theirs}.{name}.weight",) for name in names}
        rotary = f"{ours}.attention.rotary"
        constants |= positions.constants(rotary)
        sources |= positions.sources(rotary, f"{theirs}.pos_emb")
    copies = {head: embed} if flags.weight_tying else {}
    return WeightMap(
        model_config(flags, positions.config), sources, constants, partial(_adapt, positions), copies=copies,
        reading=positions.reading, pieces=lambda name: Pieces.WHOLE if name.endswith("_coef") else Pieces.ROWS,
    )  # fmt: skip


LAYER_TENSORS = {
    "": ("attn_norm", "ff_norm"),
    "attention.": ("att_proj", "attn_out"),
    "feed_forward.": ("ff_proj", "ff_out"),
}
"""Our module of a block -> the tensors it holds, which the fork keeps in the block itself."""


def _adapt(positions: Positions, name: str, tensors: list[Tensor]) -> Tensor:
    tensor = join(tensors)
    return positions.adapt(tensor) if name.endswith("_coef") else tensor


class _NoGlobals(pickle.Unpickler):
    """Reads plain tuples, strings and booleans; refuses everything that could name code."""

    def find_class(self, module: str, name: str) -> Any:
        raise CheckpointError(f"a tensor's name refers to {module}.{name}", hint="Do not trust this file.")


def tensor_name(key: str) -> str:
    """Undo the fork's safetensors names: base64 of a pickled ((name,), False). Other names pass through."""
    try:
        (name,), _ = _NoGlobals(io.BytesIO(base64.urlsafe_b64decode(key))).load()
    except CheckpointError:
        raise
    except Exception:  # what is no pickle can raise anything, and is a plain name
        return key
    return str(name)


def _read(folder: Path) -> WeightMap:
    path = folder / FILE
    data = read_yaml(path, raises=CheckpointError)
    section = data.get("model") if isinstance(data, Mapping) else None
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{path}: no model: section", hint="It must be the training run's config.yaml.")
    # As OmegaConf, which turns text into numbers and booleans.
    return read_flags(section, f"{path}: model", strict=False)


def read_flags(section: Mapping[str, Any], where: str, prefix: str = "", *, strict: bool = True) -> WeightMap:
    """The decoder that the flags in `section` describe, its tensors found under `prefix`. Errors begin with `where`."""
    flags = convert(section, OlmoFlags, where=where, strict=strict)
    try:
        return weight_map(flags, prefix)
    except ConfigError as cause:
        raise ConfigError(f"{where}: {cause}", hint=cause.hint) from cause


LAYOUT = Layout(
    evidence=f"{FILE} with a model: section",
    configuration=FILE,
    weights=("model.safetensors", "model.pt"),
    recognize=lambda folder: (folder / FILE).exists(),
    read=_read,
    tensor_name=tensor_name,
)
