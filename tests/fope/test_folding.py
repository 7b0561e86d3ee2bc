"""Which channels folding leaves unrotated, and what becomes of a rotation there."""

import numpy as np
import pytest
import torch

from fope_export.errors import ConfigError
from fope_export.fope import reference
from fope_export.fope.folding import folding_of
from fope_export.fope.spectrum import Spectrum
from tests.fope.rotations import make
from tests.support import close


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("pads", [(1.0, 1.0), (0.0, 1.0), (0.5, -2.0)], ids=str)
@pytest.mark.parametrize(("pairs", "head_dim", "rotary_dim"), [(16, 64, 32), (13, 64, 32), (4, 16, 8), (45, 128, 96)])
def test_products_stay(pairs: int, head_dim: int, rotary_dim: int, pads: tuple[float, float], pairing: str) -> None:
    shape = (4, 2, 2, head_dim, pairs + 1, pairs)
    spectrum, q, k, positions = make(shape, pairing=pairing, sin_pad=pads[0], cos_pad=pads[1])
    folding = folding_of(spectrum.config)
    folded = Spectrum(folding.config, spectrum.freq, spectrum.sin_coef, spectrum.cos_coef)
    assert folding.config.rotary_dim == rotary_dim
    k = k.repeat_interleave(2, dim=2)

    def scores(spectrum: Spectrum, *tensors: torch.Tensor) -> np.ndarray:
        turned = [reference.rotate(spectrum, t.numpy(), positions.numpy()) for t in tensors]
        made: np.ndarray = np.einsum("bqhe,bkhe->bhqk", *turned)
        return made

    wanted = scores(spectrum, q, k)
    got = scores(folded, *(t[..., folding.channels].double() * folding.scale.double() for t in (q, k)))
    close(got, wanted)  # the scale is float32


@pytest.mark.parametrize("pairs", [0, 8])
def test_nothing_to_fold_is_an_error(pairs: int) -> None:
    spectrum, *_ = make((2, 2, 2, 16, 20, pairs))
    with pytest.raises(ConfigError, match=f"nothing to fold: {pairs} pairs of 16 of 16 channels are rotated"):
        folding_of(spectrum.config)


def test_it_is_not_done_twice() -> None:
    spectrum, *_ = make((2, 2, 2, 16, 5, 3))
    with pytest.raises(ConfigError, match="nothing to fold: 3 pairs of 6 of 16 channels"):
        folding_of(folding_of(spectrum.config).config)
