"""The definition in float64: slow, obvious, the truth that every faster form is held against.

One rounding belongs to the definition: the angle is the float32 product of a position and a float32 frequency, as
in the authors' code. Near position 100,000 it moves an angle by up to 4e-3 rad, and all forms must agree on it.
"""

import numpy as np
from numpy.typing import NDArray

from fope_export.fope.spectrum import Spectrum

Float64 = NDArray[np.float64]


def series(spectrum: Spectrum, position_ids: NDArray[np.int64]) -> tuple[Float64, Float64]:
    """S and C for position_ids [B, S], each [B, S, G, rotary_dim / 2]: the Fourier series, then the pads."""
    angles = (position_ids[..., None].astype(np.float32) * spectrum.freq).astype(np.float64)
    config = spectrum.config
    missing = config.rotary_dim // 2 - config.pairs
    tables = []
    for basis, coef, pad in (
        (np.sin(angles), spectrum.sin_coef, config.sin_pad),
        (np.cos(angles), spectrum.cos_coef, config.cos_pad),
    ):
        table = np.einsum("bsd,gdf->bsgf", basis, coef.astype(np.float64))
        tables.append(np.pad(table, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=pad))
    return tables[0], tables[1]


def rotate(spectrum: Spectrum, x: NDArray[np.floating], position_ids: NDArray[np.int64]) -> Float64:
    """x [B, S, H, head_dim] at position_ids [B, S], rotated: x * C + sign * rotate_half(x) * S, in float64.

    Channels beyond rotary_dim are returned as they are.
    """
    sin, cos = (np.repeat(t, x.shape[2] // spectrum.config.groups, axis=2) for t in series(spectrum, position_ids))
    sin = sin * spectrum.config.sign
    out = x.astype(np.float64)
    channels = np.arange(spectrum.config.rotary_dim)
    left, right = channels.reshape(2, -1) if spectrum.config.pairing == "half" else channels.reshape(-1, 2).T
    out[..., left] = x[..., left] * cos - x[..., right] * sin
    out[..., right] = x[..., right] * cos + x[..., left] * sin
    return out
