"""The definition against arithmetic written out by hand."""

import math

import numpy as np

from fope_export.fope import reference
from fope_export.fope.spectrum import Spectrum
from tests.support import close


def spectrum(**fields: object) -> Spectrum:
    freq = np.array([1.0, 0.5], np.float32)
    sin_coef = np.array([[[1.0], [0.25]], [[0.5], [2.0]]], np.float32)
    cos_coef = np.array([[[0.75], [1.0]], [[1.0], [-1.0]]], np.float32)
    return Spectrum.fope(freq, sin_coef, cos_coef, 4, **fields)


def by_hand(position: int, group: int, sign: float = 1.0) -> tuple[float, float]:
    s = math.sin(position), math.sin(position * 0.5)
    c = math.cos(position), math.cos(position * 0.5)
    sin = (1.0 * s[0] + 0.25 * s[1], 0.5 * s[0] + 2.0 * s[1])[group]
    cos = (0.75 * c[0] + 1.0 * c[1], 1.0 * c[0] - 1.0 * c[1])[group]
    return sign * sin, cos


def test_half_pairs_with_pads() -> None:
    x = np.array([[[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]])
    out = reference.rotate(spectrum(sin_pad=0.5, cos_pad=0.25), x, np.array([[3]]))
    for head in (0, 1):
        sin, cos = by_hand(3, head)
        a, b, c, d = x[0, 0, head]
        expected = [a * cos - c * sin, b * 0.25 - d * 0.5, c * cos + a * sin, d * 0.25 + b * 0.5]
        close(out[0, 0, head], expected, eps=np.finfo(np.float64).eps)


def test_interleaved_pairs_with_the_other_sign() -> None:
    x = np.array([[[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]])
    out = reference.rotate(spectrum(pairing="interleaved", sign=-1), x, np.array([[7]]))
    sin, cos = by_hand(7, 0, sign=-1.0)
    a, b, c, d = x[0, 0, 0]
    expected = [a * cos - b * sin, b * cos + a * sin, c + d, d - c]
    close(out[0, 0, 0], expected, eps=np.finfo(np.float64).eps)


def test_query_heads_share_the_coefficients_of_their_group() -> None:
    x = np.ones((1, 1, 4, 4))
    out = reference.rotate(spectrum(), x, np.array([[5]]))
    np.testing.assert_array_equal(out[0, 0, 0], out[0, 0, 1])
    np.testing.assert_array_equal(out[0, 0, 2], out[0, 0, 3])
    assert not np.allclose(out[0, 0, 0], out[0, 0, 2])
