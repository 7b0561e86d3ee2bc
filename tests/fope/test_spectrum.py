import msgspec
import numpy as np
import pytest

from fope_export.errors import ConfigError
from fope_export.fope import reference
from fope_export.fope.spectrum import Spectrum

FREQ = np.array([1.0, 0.5, 0.25, 0.125], np.float32)
EYE = np.eye(4, dtype=np.float32)[None]
POSITIONS = np.array([[0, 3, 100_000]])


def test_rope_is_the_case_of_identity_coefficients() -> None:
    spectrum = Spectrum.rope(FREQ, 8)
    sin, cos = reference.series(spectrum, POSITIONS)
    angles = POSITIONS[..., None].astype(np.float32) * FREQ
    np.testing.assert_array_equal(sin[:, :, 0], np.sin(angles.astype(np.float64)))
    np.testing.assert_array_equal(cos[:, :, 0], np.cos(angles.astype(np.float64)))


def test_nope_leaves_everything_as_it_is() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8))
    np.testing.assert_array_equal(reference.rotate(Spectrum.nope(8), x, POSITIONS), x)


def test_frequencies_clamped_to_zero_leave_their_pairs_unrotated() -> None:
    clamped = np.where(FREQ < 0.3, 0, FREQ).astype(np.float32)
    spectrum = Spectrum.rope(clamped, 8)
    assert (spectrum.config.frequencies, spectrum.config.pairs) == (2, 2)
    sin, cos = reference.series(spectrum, POSITIONS)
    np.testing.assert_array_equal(sin[..., 2:], 0)
    np.testing.assert_array_equal(cos[..., 2:], 1)


def test_the_attention_factor_scales_every_pair() -> None:
    plain, scaled = Spectrum.rope(FREQ, 8), Spectrum.rope(FREQ, 8, scale=1.25)
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8))
    expected = 1.25 * reference.rotate(plain, x, POSITIONS)
    np.testing.assert_allclose(reference.rotate(scaled, x, POSITIONS), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freq": FREQ[:3]}, "freq is float32 (3,)"),
        ({"freq": FREQ[::-1].copy()}, "descend"),
        ({"freq": -FREQ}, "not be negative"),
        ({"sin_coef": EYE * np.nan}, "not finite"),
        ({"cos_coef": EYE.astype(np.float64)}, "cos_coef is float64"),
    ],
)
def test_numbers_that_contradict_the_configuration_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    good = {"freq": FREQ, "sin_coef": EYE, "cos_coef": EYE}
    config = Spectrum.rope(FREQ, 8).config
    Spectrum(config, **good)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Spectrum(config, **(good | change))


@pytest.mark.parametrize("change", [{"head_dim": 7}, {"pairs": 5}, {"frequencies": 0}])
def test_impossible_configurations_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        msgspec.structs.replace(Spectrum.rope(FREQ, 8).config, **change)


def test_the_description_identifies_the_numbers() -> None:
    first = Spectrum.fope(FREQ, EYE, EYE, 16)
    other = Spectrum.fope(FREQ, EYE * 2, EYE, 16)
    assert first.describe()["freq"] == FREQ.tolist()
    assert first.describe()["sin_coef_sha256"] != other.describe()["sin_coef_sha256"]
    assert first.describe()["cos_coef_sha256"] == other.describe()["cos_coef_sha256"]
