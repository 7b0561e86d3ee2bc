"""Spectra, and what they are to turn."""

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fope_export.fope.spectrum import Spectrum

# H, K, G, head_dim, D, F
SHAPES = [(4, 4, 4, 64, 13, 13), (4, 2, 2, 32, 9, 8), (6, 3, 1, 16, 5, 4), (2, 2, 2, 16, 20, 8), (3, 1, 1, 2, 1, 1)]
VARIANTS = [
    {},
    {"sin_pad": 0.0},
    {"sign": -1},
    {"pairing": "interleaved", "sin_pad": 0.5, "cos_pad": 0.25},
    {"pairing": "interleaved", "sign": -1},
]
PARTIAL = [
    ((4, 2, 2, 32, 9, 8), {"rotary_dim": 16}),
    ((6, 3, 1, 16, 5, 4), {"rotary_dim": 12, "pairing": "interleaved"}),
]
"""Channels that form no pair."""
ALL = [*product(SHAPES, VARIANTS), *PARTIAL]


def make(shape: tuple[int, ...], seed: int = 0, **fields: Any) -> tuple[Spectrum, Tensor, Tensor, Tensor]:
    heads, kv_heads, groups, head_dim, count, pairs = shape
    rng = np.random.default_rng(seed)
    freq = np.sort(rng.random(count).astype(np.float32))[::-1].copy()
    sines, cosines = (rng.standard_normal((groups, count, pairs)).astype(np.float32) for _ in range(2))
    q, k = (torch.from_numpy(rng.standard_normal((2, 7, n, head_dim)).astype(np.float32)) for n in (heads, kv_heads))
    positions = torch.from_numpy(rng.integers(0, 100_000, (2, 7)))
    return Spectrum.fope(freq, sines, cosines, head_dim, **fields), q, k, positions
