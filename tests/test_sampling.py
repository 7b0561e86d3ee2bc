"""Draws: their odds, what they depend on, and what they do not."""

import numpy as np
import pytest

from fope_export.errors import ConfigError
from fope_export.sampling import Sampling, sample


def drawn(logits: np.ndarray, count: int, **options: float) -> np.ndarray:
    rows = np.broadcast_to(logits, (count, len(logits)))
    return np.array(sample(rows, Sampling(**{"temperature": 1.0} | options), range(count)))


def test_without_a_temperature_the_likeliest_is_taken() -> None:
    assert sample(np.array([[0.1, 3.0, 2.0], [5.0, 1.0, 1.0]]), Sampling(seed=4), [0, 9]) == [1, 0]


def test_top_k_and_top_p_leave_out_the_tail() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3]))

    def met(**options: float) -> set[int]:
        return {*drawn(logits, 300, **options).tolist()}

    assert met() == {0, 1, 2, 3}
    assert met(top_k=2) == {1, 3}
    assert met(top_p=0.5) == {1}
    assert met(top_p=0.6) == {1, 3}
    assert met(top_k=3, top_p=0.9) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_shapes_the_odds(temperature: float) -> None:
    count, odds = 4000, np.array([0.7, 0.2, 0.1])
    shares = np.bincount(drawn(np.log(odds), count, temperature=temperature), minlength=3) / count
    wanted = odds ** (1 / temperature) / (odds ** (1 / temperature)).sum()
    spread = np.sqrt(wanted * (1 - wanted) / count)
    assert (np.abs(shares - wanted) < 5 * spread).all()  # the draws are fixed by the seed: it holds or it does not


@pytest.mark.parametrize("temperature", [1e-4, 1e-300, 1e-308, 5e-324])
def test_close_to_zero_it_is_greedy(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    assert sample(logits, Sampling(temperature=temperature), range(20)) == logits.argmax(1).tolist()


def test_a_draw_depends_on_seed_choice_and_place_alone() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 100))
    options = Sampling(temperature=2.0, seed=3)
    together = sample(logits, options, range(6))
    assert together == [sample(logits[i : i + 1], options, [i])[0] for i in range(6)]
    assert together != sample(logits, options, range(1, 7))
    assert together != sample(logits, options, range(6), choice=1)
    assert together != sample(logits, Sampling(temperature=2.0, seed=4), range(6))


def test_rounding_that_swaps_two_candidates_changes_no_other_draw() -> None:
    logits = np.random.default_rng(0).normal(size=60)
    order = np.argsort(-logits)
    logits[order[1]] = np.nextafter(logits[order[0]], -9)
    swapped = logits.copy()
    swapped[order[:2]] = logits[order[:2]][::-1]
    assert (drawn(logits, 300, top_p=0.9) == drawn(swapped, 300, top_p=0.9)).all()


@pytest.mark.parametrize("options", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0}])
def test_impossible_settings(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**options)
