"""The position embedding in the flags of the paper's repository, which ports of its code to other decoders keep.

Flags, defaults and order of operations follow RotaryEmbedding and FourierEmbedding in olmo/model.py of that repository.
rope_pp/modeling_llama_fope.py (github.com/OpenMOSS/rope_pp) computes the same for a Llama with grouped queries.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from fope_export.config import Checked, Positive, Size, SpectrumConfig
from fope_export.fope import frequencies
from fope_export.fope.rotary import normalized
from fope_export.fope.spectrum import Spectrum
from fope_export.model.layouts.base import Positions, only_supported, without_clashes

READING = "the paper's repository and rope_pp"
"""Whose code the flags are read as."""


class PaperFlags(Checked, frozen=True, kw_only=True):
    """Every flag of the position embedding with its default in the fork's ModelConfig."""

    rope: bool = False
    rope_theta: Positive = 10_000.0
    rope_full_precision: bool = True
    rope_init_upper_freq: float = 1.0
    rope_init_floor_freq: float = 0.0
    rope_clamp_floor_freq: bool = False
    rope_clamp_floor_to_zero: bool = False
    rope_floor_freq_ratio: float = 1.0
    fourier: bool = False
    fourier_dim: Size = 0
    fourier_separate_basis: bool = True
    fourier_separate_head: bool = True
    fourier_norm: bool = False
    fourier_ignore_zero: bool = True
    len_extra: bool = False
    len_extra_type: str = "PI"
    len_extra_before_clamp: bool = False
    len_extra_orig_length: Size = 0
    len_extra_yarn_scale: Positive = 16.0
    len_extra_yarn_beta_fast: Positive = 32.0
    len_extra_yarn_beta_slow: Positive = 1.0
    len_extra_yarn_factor: float = 1.0

    # Each must have the value that REQUIRED states.
    rope_init_distribution: str = "exponential"
    rope_no_pos: bool = False
    rope_learnable: bool = False
    rope_include_neg_freq: bool = False
    rope_clamp_upper_freq: bool = False
    rope_zero_freq_ratio: float = -1.0
    rope_clamp_to_linear: bool = False

    # Without effect on what a trained model computes: initialization, and flags that are read where another is set.
    rope_no_rotary: bool = False
    rope_no_repetition: bool = False
    rope_upper_freq_ratio: float = 1.0
    rope_clamp_upper_to_zero: bool = True
    rope_clamp_to_linear_mode: str = "ceil"
    fourier_init: str = "eye_xavier_norm"
    fourier_init_norm_gain: float = 0.3
    fourier_learnable: bool = False
    len_extra_fourier_expand: bool = False


REQUIRED: dict[str, tuple[Any, ...]] = {
    "rope_init_distribution": ("exponential",),
    "rope_no_pos": (False,),
    "rope_learnable": (False,),
    "rope_include_neg_freq": (False,),
    "rope_clamp_upper_freq": (False,),
    "rope_zero_freq_ratio": (-1.0,),
    "rope_clamp_to_linear": (False,),
}
"""Flags that no published model changes, and the values that are read."""


def check(flags: PaperFlags) -> None:
    """Raises ConfigError naming the first flag, or pair of flags, that is not read."""
    only_supported(flags, REQUIRED)
    without_clashes(
        {
            "fourier needs rope": flags.fourier and not flags.rope,
            # The code then reads a ratio that it never sets.
            "rope_clamp_floor_freq needs rope_clamp_floor_to_zero": flags.rope_clamp_floor_freq
            and not flags.rope_clamp_floor_to_zero,
            f"len_extra_type {flags.len_extra_type!r} is neither PI nor YARN": flags.len_extra
            and flags.len_extra_type not in ("PI", "YARN"),
            "len_extra needs len_extra_orig_length": flags.len_extra and not flags.len_extra_orig_length,
            "len_extra_yarn_beta_fast or _slow is no number of turns": max(
                flags.len_extra_yarn_beta_fast, flags.len_extra_yarn_beta_slow
            )
            > 1e30,
            "YARN needs a rope_theta above 1": flags.len_extra
            and flags.len_extra_type == "YARN"
            and flags.rope_theta <= 1,
            "fourier_dim is odd": flags.fourier_dim % 2,
        }
    )


def base_frequencies(flags: PaperFlags, head_dim: int, length: int) -> Tensor:
    """float32 [dim / 2], dim = max(fourier_dim, head_dim), zeros where a frequency was clamped away; `length` is that
    of training.
    """
    dim = max(flags.fourier_dim if flags.fourier else 0, head_dim)
    freq = frequencies.exponential(
        flags.rope_theta, dim, upper=flags.rope_init_upper_freq, floor=flags.rope_init_floor_freq
    )
    if flags.len_extra and flags.len_extra_before_clamp:
        freq = _extend(flags, freq, dim, length)
    if flags.rope_clamp_floor_freq:
        freq = frequencies.floor_to_zero(freq, length, flags.rope_floor_freq_ratio)
    if flags.len_extra and not flags.len_extra_before_clamp:
        freq = _extend(flags, freq, dim, length)
    return freq


def _extend(flags: PaperFlags, freq: Tensor, dim: int, length: int) -> Tensor:
    if flags.len_extra_type == "PI":
        return frequencies.interpolate(freq, flags.len_extra_orig_length, length)
    return frequencies.yarn(
        freq, dim, flags.rope_theta, scale=flags.len_extra_yarn_scale, original_length=flags.len_extra_orig_length,
        beta_fast=flags.len_extra_yarn_beta_fast, beta_slow=flags.len_extra_yarn_beta_slow,
        factor=flags.len_extra_yarn_factor,
    )  # fmt: skip


def positions(flags: PaperFlags, *, head_dim: int, groups: int, length: int) -> Positions:
    """What the flags say about each layer; `groups` are the heads that have coefficients of their own where heads have.

    Without `fourier`, a clamped frequency stays at angle 0, where the cosine is 1 and the sine 0: that pair is not
    rotated. With it, its pair has the padding 1 and 1.
    """
    freq = base_frequencies(flags, head_dim, length)
    if not flags.fourier:
        whole = Spectrum.rope((freq if flags.rope else freq[:0]).numpy(), head_dim)
        config = msgspec.structs.replace(whole.config, full_precision=flags.rope_full_precision)
        return Positions(
            config, torch.from_numpy(whole.freq), freq, whole=whole, reading={"read as": f"{READING} (RoPE)"}
        )
    if flags.fourier_ignore_zero:
        freq = freq[freq != 0]
    config = SpectrumConfig(
        head_dim=head_dim,
        rotary_dim=head_dim,
        frequencies=len(freq),
        pairs=min(len(freq), head_dim // 4) if flags.fourier_ignore_zero else head_dim // 2,
        groups=groups if flags.fourier_separate_head else 1,
        sin_pad=1.0,
        cos_pad=1.0,
        sign=1,
        pairing="half",
        full_precision=flags.rope_full_precision,
    )
    norm = "each column divided by its sum over D" if flags.fourier_norm else "none"
    return Positions(
        config, freq, freq, stored=_stored(flags), adapt=partial(_adapt, flags),
        reading={"read as": READING, "normalization": norm},
    )  # fmt: skip


def _stored(flags: PaperFlags) -> Mapping[str, str]:
    return {name: name if flags.fourier_separate_basis else "fourier_coef" for name in ("sin_coef", "cos_coef")}


def _adapt(flags: PaperFlags, coef: Tensor) -> Tensor:
    coef = normalized(coef) if flags.fourier_norm and coef.ndim > 1 else coef
    return coef if flags.fourier_separate_head else coef[None]
