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
THREE: dict[str, Any] = {"axes": 3, "axis": (0, 1, 2, 0, 1, 2, 0, 0, 0)}
GENERAL: list[tuple[tuple[int, ...], dict[str, Any], bool]] = [
    ((4, 2, 2, 32, 9, 8), THREE, True),
    ((4, 2, 2, 32, 9, 8), {"bases": 2}, True),
    ((4, 2, 2, 32, 9, 8), {}, False),
    ((6, 3, 1, 16, 5, 4), {"axes": 2, "axis": (1, 1, 0, 0, 1), "bases": 2, "pairing": "interleaved", "sign": -1}, True),
    ((6, 3, 1, 16, 5, 4), {"axes": 2, "axis": (1, 1, 0, 0, 1), "bases": 2, "rotary_dim": 12, "sin_pad": 0.5}, False),
    ((2, 2, 2, 16, 20, 8), {"bases": 2, "cos_pad": -2.0}, False),
]
"""With whether positions are whole numbers."""


def make(
    shape: tuple[int, ...], seed: int = 0, *, whole: bool = True, **fields: Any
) -> tuple[Spectrum, Tensor, Tensor, Tensor]:
    """Positions are [B, S], or [A, B, S] where the fields state several axes."""
    heads, kv_heads, groups, head_dim, count, pairs = shape
    rng = np.random.default_rng(seed)
    freq = np.sort(rng.random(count).astype(np.float32))[::-1].copy()
    rows, axes = count * fields.get("bases", 1), fields.get("axes", 1)
    sines, cosines = (rng.standard_normal((groups, rows, pairs)).astype(np.float32) for _ in range(2))
    q, k = (torch.from_numpy(rng.standard_normal((2, 7, n, head_dim)).astype(np.float32)) for n in (heads, kv_heads))
    positions = torch.from_numpy(rng.integers(0, 100_000, (axes, 2, 7) if axes > 1 else (2, 7)))
    if not whole:
        positions = torch.from_numpy(rng.uniform(-40, 40, positions.shape).astype(np.float32))
    return Spectrum.fope(freq, sines, cosines, head_dim, **fields), q, k, positions
