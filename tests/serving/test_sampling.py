"""Draws: their odds, what they depend on, and what they do not."""

from typing import Any

import numpy as np
import pytest

from fope_export.errors import ConfigError
from fope_export.generation import generate
from fope_export.serving.sampling import FEW, Draw, SamplingParams, adjusted, sample
from tests.support import Forgetful


def at(places: range, choice: int = 0, **options: Any) -> list[Draw]:
    sampling = SamplingParams(**options)
    return [Draw(sampling, place, choice) for place in places]


def drawn(logits: np.ndarray, count: int, **options: Any) -> np.ndarray:
    rows = np.broadcast_to(logits, (count, len(logits)))
    return np.array(sample(rows, at(range(count), **{"temperature": 1.0} | options)))


def test_without_a_temperature_the_likeliest_is_taken() -> None:
    assert sample(np.array([[0.1, 3.0, 2.0], [5.0, 1.0, 1.0]]), at(range(2), seed=4)) == [1, 0]


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
    assert sample(logits, at(range(20), temperature=temperature)) == logits.argmax(1).tolist()


def test_a_draw_depends_on_seed_choice_and_place_alone() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 100))
    options: dict[str, Any] = {"temperature": 2.0, "seed": 3}
    together = sample(logits, at(range(6), **options))
    assert together == [sample(logits[i : i + 1], at(range(i, i + 1), **options))[0] for i in range(6)]
    assert together != sample(logits, at(range(1, 7), **options))
    assert together != sample(logits, at(range(6), choice=1, **options))
    assert together != sample(logits, at(range(6), **options | {"seed": 4}))


def test_rows_have_settings_of_their_own() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 100))
    settings: list[dict[str, Any]] = [
        {}, {"temperature": 1.5, "seed": 2}, {"temperature": 0.7, "top_k": 5}, {"logit_bias": {7: 100.0}},
    ]  # fmt: skip
    draws = [at(range(9, 10), **each)[0] for each in settings]
    assert sample(logits, draws) == [sample(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    assert sample(logits, draws)[3] == 7


def test_rounding_that_swaps_two_candidates_changes_no_other_draw() -> None:
    logits = np.random.default_rng(0).normal(size=60)
    order = np.argsort(-logits)
    logits[order[1]] = np.nextafter(logits[order[0]], -9)
    swapped = logits.copy()
    swapped[order[:2]] = logits[order[:2]][::-1]
    assert (drawn(logits, 300, top_p=0.9) == drawn(swapped, 300, top_p=0.9)).all()


def by_sorting(logits: np.ndarray, place: int, sampling: SamplingParams) -> int:
    """What is drawn, written down plainly: everything sorted, noise for every token."""
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[logits[order] >= logits[order[min(sampling.top_k, len(order)) - 1]]]
    odds = np.exp((logits - logits.max()) / sampling.temperature)
    share = odds[order].cumsum() / odds[order].sum()
    order = order[: int((share < sampling.top_p).sum()) + 1]
    order = order[odds[order] >= sampling.min_p * odds.max()]
    key = np.random.SeedSequence((sampling.seed, 0, place)).generate_state(2, np.uint64)
    raw = np.random.Philox(key=key).random_raw(len(logits)) >> np.uint64(11)
    noise = -np.log(-np.log((raw + 0.5) * 2.0**-53))
    return int(order[(np.log(odds[order]) + noise[order]).argmax()])


@pytest.mark.parametrize("size", [30, 3 * FEW, 20 * FEW])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7}, {"top_p": 0.9}, {"top_p": 0.9999}, {"min_p": 0.2}, {"top_k": 50, "top_p": 0.8}],
    ids=str,
)
def test_it_is_what_sorting_the_whole_vocabulary_gives(size: int, options: dict[str, Any]) -> None:
    sampling = SamplingParams(temperature=1.3, seed=5, **options)
    logits = np.random.default_rng(size).normal(size=(40, size)).round(2)  # rounded: with ties
    got = sample(logits, [Draw(sampling, place) for place in range(40)])
    assert got == [by_sorting(row, place, sampling) for place, row in enumerate(logits)]


def test_min_p_leaves_out_what_is_unlikely_beside_the_likeliest() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    assert {*drawn(logits, 300, min_p=0.25).tolist()} == {1, 2, 3}
    assert {*drawn(logits, 300, min_p=1.0).tolist()} == {1}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"repetition_penalty": 2.0}, [1.0, 1.5, 2.0, -2.0, 0.5]),
        ({"presence_penalty": 0.5}, [2.0, 2.5, 2.0, -1.0, 0.5]),
        ({"frequency_penalty": 0.5}, [2.0, 1.5, 2.0, -1.0, 0.5]),
        ({"logit_bias": {2: -2.0, 4: 1.0}}, [2.0, 3.0, 0.0, -1.0, 1.5]),
        ({"logit_bias": {1: -2.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0}, [1.0, -0.5, 2.0, -2.0, 0.5]),
    ],
    ids=str,
)
def test_penalties_and_biases_change_the_logits(options: dict[str, Any], wanted: list[float]) -> None:
    """The prompt has tokens 0 and 3, the answer token 1 three times."""
    logits = np.array([2.0, 3.0, 2.0, -1.0, 0.5])
    before, draw = logits.copy(), Draw(SamplingParams(**options), 5, 0, (0, 3, 3), {1: 3})
    assert adjusted(logits, draw).tolist() == wanted and (logits == before).all()
    assert sample(logits[None], [draw]) == [int(np.argmax(wanted))]


def test_a_prompt_and_its_answer_are_what_generation_penalizes() -> None:
    """A model that always gives the first tokens the largest logits: what came before is left out."""
    backend = Forgetful(lambda feeds: np.broadcast_to(np.arange(9.0, 0, -1), (*feeds.input_ids.shape, 9)), 9)

    def made(**options: Any) -> list[int]:
        return [token for _, token in generate(backend, [[4, 0, 4]], SamplingParams(max_new_tokens=5, **options))]

    assert made() == [0] * 5
    assert made(repetition_penalty=1e9) == [1, 2, 3, 5, 6]
    assert made(presence_penalty=1.5) == [0, 1, 0, 0, 0]
    assert made(frequency_penalty=0.75) == [0, 0, 1, 0, 1]


def test_a_bias_of_no_token_is_refused() -> None:
    for bias in ({50: 1.0}, {-1: 1.0}, {3: float("nan")}):
        with pytest.raises(ConfigError, match="logit_bias adds"):
            SamplingParams(logit_bias=bias).check(50)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0}, {"min_p": 1.5},
        {"repetition_penalty": 0.0}, {"presence_penalty": 3.0},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**options)
