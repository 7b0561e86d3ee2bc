"""The rule: noise passes, more than noise does not, and nothing passes by being empty or not a number."""

import math

import numpy as np
import pytest

from fope_export.errors import ParityError
from fope_export.parity.judge import FACTOR, FLOOR, METRICS, judge, limit, measure

RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal((50, 64)) * 3
NOISE = 1e-4
NOISY = TRUTH + NOISE * RNG.standard_normal(TRUTH.shape)


def with_noise(scale: float, seed: int = 1) -> np.ndarray:
    return TRUTH + scale * NOISE * np.random.default_rng(seed).standard_normal(TRUTH.shape)


@pytest.mark.parametrize("seed", range(5))
def test_another_draw_of_the_same_noise_passes(seed: int) -> None:
    verdict = judge(TRUTH, NOISY, with_noise(1, seed))
    assert verdict.passed and verdict.ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("factor", [FACTOR * 1.1, 10, 1e4])
def test_more_noise_fails(factor: float) -> None:
    verdict = judge(TRUTH, NOISY, with_noise(factor))
    assert {"relative", "cosine"} <= set(verdict.failed)


def test_one_wrong_logit_fails() -> None:
    spoiled = with_noise(1)
    spoiled[17, 5] += 20 * NOISE
    assert judge(TRUTH, NOISY, spoiled).failed == ("max_abs",)


def test_a_scale_that_the_cosine_cannot_see_fails() -> None:
    verdict = judge(TRUTH, NOISY, TRUTH * 1.001)
    assert not verdict.passed and "cosine" not in verdict.failed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(value: float) -> None:
    spoiled = with_noise(1)
    spoiled[3, 3] = value
    verdict = judge(TRUTH, NOISY, spoiled)
    assert set(verdict.failed) == set(METRICS) and verdict.got.non_finite == 1


def test_near_ties_are_excused_and_other_flips_are_not() -> None:
    truth = np.array([[1.0, 1.0 - 1e-6, 0.0], [1.0, 0.5, 0.0]])
    tie = np.array([[1.0 - 1e-6, 1.0, 0.0], [1.0, 0.5, 0.0]])
    flip = np.array([[1.0, 1.0 - 1e-6, 0.0], [0.5, 1.0, 0.0]])
    assert measure(truth, tie, allowed=1e-6).flips == 0
    assert measure(truth, flip, allowed=1e-6).flips == 1


def test_the_measures_are_what_they_say() -> None:
    truth, got = np.array([[0.0, math.log(3.0)]]), np.array([[0.0, 0.0]])
    found = measure(truth, got, allowed=0)
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()))
    assert found.max_abs == pytest.approx(math.log(3)) and found.relative == pytest.approx(1)
    a, b = np.array([[1.0, 2.0, 2.0]]), np.array([[2.0, 1.0, 2.0]])
    assert measure(a, b, allowed=0).cosine == pytest.approx(1 - 8 / 9)


def test_tiny_noise_has_a_floor() -> None:
    assert limit(TRUTH, TRUTH) == FLOOR * np.abs(TRUTH).max()
    assert judge(TRUTH, TRUTH, TRUTH.astype(np.float32)).passed


@pytest.mark.parametrize("got", [TRUTH[:10], TRUTH[:, :10]])
def test_unequal_shapes_and_nothing_are_errors(got: np.ndarray) -> None:
    with pytest.raises(ParityError):
        judge(TRUTH, NOISY, got)
    with pytest.raises(ParityError):
        judge(TRUTH[:0], NOISY[:0], got[:0])


def test_a_yardstick_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ParityError, match="PyTorch itself"):
        judge(TRUTH, np.full_like(TRUTH, np.nan), TRUTH)
