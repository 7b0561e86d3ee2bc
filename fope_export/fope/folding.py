"""Folding: padded channel pairs stay unrotated, and the constant that turned them goes into what makes q and k.

A pair of q and the same pair of k, both turned by one constant angle and scaled by r = sqrt(sin_pad² + cos_pad²), have
the product that they have unturned, times r². So each is scaled by r once, where its projection is stored.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from fope_export.config import SpectrumConfig
from fope_export.errors import ConfigError

WIDE = 16
"""Channels that a kernel reads at once: 8 pairs fill 16 bytes in a half type. A whole number of them is rotated."""


@dataclass(frozen=True)
class Folding:
    """A head whose padded channels come last, E channels wide."""

    config: SpectrumConfig
    """Of the rotation that is left."""
    channels: Tensor
    """int64 [E]: which of the old head's channels each one was."""
    scale: Tensor
    """float32 [E]: what it is multiplied by, in q and in k."""


def scale_of(config: SpectrumConfig) -> float:
    """What the padding multiplies a channel pair's length by."""
    return float(np.hypot(config.sin_pad, config.cos_pad))


def folding_of(config: SpectrumConfig) -> Folding:
    """How to fold a rotation of all E channels of a head.

    Raises ConfigError where it has no padded pairs, or none that are rotated.
    """
    total, needed = config.head_dim, 2 * config.pairs
    wide = -(-needed // WIDE) * WIDE
    rotary_dim = wide if wide < total else needed
    if config.rotary_dim != total or rotary_dim in (0, total):
        raise ConfigError(
            f"nothing to fold: {config.pairs} pairs of {config.rotary_dim} of {total} channels are rotated",
            hint="Export without fold_padding (--fold-padding).",
        )
    channels = torch.arange(total)
    if config.pairing == "half":
        rotated, padded = channels.reshape(2, -1).tensor_split((rotary_dim // 2,), dim=1)
        channels = torch.cat((rotated.flatten(), padded.flatten()))
    scale = torch.ones(total)
    scale[rotary_dim:] = scale_of(config)
    return Folding(msgspec.structs.replace(config, rotary_dim=rotary_dim), channels, scale)
