"""The definition in float64: slow, obvious, the truth that every faster form is held against.

One rounding belongs to the definition: the angle is the float32 product of a position and a float32 frequency, as
in the authors' code. Near position 100,000 it moves an angle by up to 4e-3 rad, and all forms must agree on it.
"""

import numpy as np
from numpy.typing import NDArray

from fope_export.fope.spectrum import Spectrum

Float64 = NDArray[np.float64]
Positions = NDArray[np.int64] | NDArray[np.floating]


def bases(spectrum: Spectrum, position_ids: Positions) -> tuple[Float64, Float64]:
    """What sine and cosine of the series are mixtures of, each [B, S, J], for position_ids [B, S] or [A, B, S]: of one
    basis, sines and cosines; of both, for each of them all sines and then all cosines. A token with one position stands
    there on every axis.
    """
    config, positions = spectrum.config, position_ids.astype(np.float32)
    each = positions[..., None] if positions.ndim == 2 else np.moveaxis(positions[[*config.axis]], 0, -1)
    angles = (each * spectrum.freq).astype(np.float64)
    sines, cosines = np.sin(angles), np.cos(angles)
    both = np.concatenate((sines, cosines), axis=-1)
    return (sines, cosines) if config.bases == 1 else (both, both)


def series(spectrum: Spectrum, position_ids: Positions) -> tuple[Float64, Float64]:
    """S and C for position_ids [B, S] or [A, B, S], each [B, S, G, rotary_dim / 2]: the Fourier series, then the
    pads.
    """
    config = spectrum.config
    missing = config.rotary_dim // 2 - config.pairs
    coefs = (spectrum.sin_coef, config.sin_pad), (spectrum.cos_coef, config.cos_pad)
    tables = []
    for basis, (coef, pad) in zip(bases(spectrum, position_ids), coefs, strict=True):
        table = np.einsum("bsj,gjf->bsgf", basis, coef.astype(np.float64))
        tables.append(np.pad(table, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=pad))
    return tables[0], tables[1]


def rotate(spectrum: Spectrum, x: NDArray[np.floating], position_ids: Positions) -> Float64:
    """x [B, S, H, head_dim] at position_ids [B, S] or [A, B, S], rotated: x * C + sign * rotate_half(x) * S, in
    float64.

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
