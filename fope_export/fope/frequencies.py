"""Frequencies as training computed them, in radians per token.

In torch and float32 on purpose: numpy's float32 power differs in the last bit, and at position 100,000 the last bit
of a frequency is the third digit of an angle.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fope_export.errors import ConfigError

WIDEST = 1 << 20
"""Channels of a head that are taken. A larger number is no size, and would fill the memory."""


def exponential(theta: float, dim: int, *, upper: float = 1.0, floor: float = 0.0) -> Tensor:
    """theta ** (-2i / dim) for i < dim / 2 as float32 [dim / 2], mapped affinely from [0, 1] to [floor, upper].

    Raises ConfigError for more channels than any head has.
    """
    if dim > WIDEST:
        raise ConfigError(
            f"a head has {dim} channels, and at most {WIDEST} are taken", hint="Is the configuration damaged?"
        )
    freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return floor + freq * (upper - floor)


def floor_to_zero(freq: Tensor, training_length: int, ratio: float = 1.0) -> Tensor:
    """Zero every frequency that completes less than `ratio` periods in `training_length` tokens (paper, Eq. 13)."""
    return torch.where(freq < 2 * math.pi / training_length * ratio, 0.0, freq)


def interpolate(freq: Tensor, original_length: int, length: int) -> Tensor:
    """Position interpolation (PI, arXiv 2306.15595): squeeze `length` tokens into `original_length`."""
    return freq * (original_length / length)


def yarn(
    freq: Tensor, dim: int, theta: float, *, scale: float, original_length: int,
    beta_fast: float = 32.0, beta_slow: float = 1.0, factor: float = 1.0, truncate: bool = True,
) -> Tensor:  # fmt: skip
    """YARN (arXiv 2309.00071, section 3.2): divide slow frequencies by `scale`, keep fast ones, blend between.

    freq [dim / 2], or the first of them. `factor` weighs the kept part (`len_extra_yarn_factor` of the authors' code; 1
    in Hugging Face's); without `truncate` the blend ends between pairs.
    """

    def pair_of(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(beta_fast), pair_of(beta_slow)
    low = max(math.floor(first) if truncate else first, 0)
    high: float = min(math.ceil(last) if truncate else last, dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = ((torch.arange(len(freq), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = (1 - ramp) * factor
    return freq / scale * (1 - keep) + freq * keep


def llama3(freq: Tensor, factor: float, *, low: float, high: float, original_length: int) -> Tensor:
    """Llama 3.1's scaling (modeling_rope_utils.py of transformers): divide by `factor` what turns less than `low` times
    in `original_length` tokens, keep what turns more than `high` times, blend between.
    """
    turns = original_length * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freq / factor + keep * freq


def extended(freq: Tensor, dim: int, kind: str, *, original_length: int, length: int) -> Tensor:
    """The kept frequencies [D] of a model trained at `original_length`, for contexts of `length`: "pi" or "yarn".

    As the authors' code does after the floor (`len_extra`), with their defaults. The base is read off the frequencies.

    Raises ConfigError where these do not fall exponentially, as those that were already extended.
    """
    if kind == "pi":
        return interpolate(freq, original_length, length)
    fall = freq.double().log().diff().neg()
    if len(freq) < 2 or not torch.allclose(fall, fall[:1].expand_as(fall), rtol=1e-4, atol=0):
        raise ConfigError(
            "YARN needs frequencies that fall exponentially, and these do not",
            hint="Was the model extended before? Use pi, or the original checkpoint.",
        )
    theta = float((fall.mean() * dim / 2).exp())
    return yarn(freq, dim, theta, scale=length / original_length, original_length=original_length)


def axis_by_turns(sections: Sequence[int], count: int) -> tuple[int, ...]:
    """Which of a token's positions each of `count` frequencies takes where the axes take turns, as in Qwen3-VL
    ("interleaved"): 0, 1, 2, 0, 1, 2, …, an axis as often as its section says. All others take the first.
    """
    axis = [0] * count
    for i, length in enumerate(sections):
        for d in range(i, min(length * len(sections), count), len(sections)):
            axis[d] = i
    return tuple(axis)


def axis_in_sections(sections: Sequence[int]) -> tuple[int, ...]:
    """The same where each axis has its section of neighbouring frequencies, as in Qwen2-VL: 0, 0, …, 1, 1, …, 2, …"""
    return tuple(i for i, length in enumerate(sections) for _ in range(length))
