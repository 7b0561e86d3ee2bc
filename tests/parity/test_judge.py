"""The rule: rounding passes, more does not, each ratio sees what the others miss, and nothing passes by being empty,
exact, or not a number."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest

from fope_export.errors import ParityError
from fope_export.parity import judge as judging
from fope_export.parity.judge import CLEAR, ENOUGH, LIMITS, MEMBERS, METRICS, MORE, Noise, judge, judge_columns, measure

N, V, ROUNDING = 512, 64, 1e-6
EPS = float(np.finfo(np.float32).eps)
TRUTH = np.random.default_rng(0).standard_normal((N, V)) * 3
SIZES = ROUNDING * np.random.default_rng(1).uniform(0.2, 5, (N, 1))
"""Tokens round differently."""
QUIET, LOUD = int(SIZES.argmin()), int(SIZES.argmax())
PEAK = math.sqrt(2 * math.log(V))
"""About the largest of V normal numbers."""


def drawn(seed: int, scale: float = 1.0) -> np.ndarray:
    return TRUTH + scale * SIZES * np.random.default_rng((2, seed)).standard_normal(TRUTH.shape)


NOISE = Noise.of(TRUTH, [drawn(seed) for seed in range(MEMBERS)], EPS)


def changed(change: Callable[[np.ndarray], None]) -> np.ndarray:
    """A right backend's errors, in units of the noise of a token's logit, with a change."""
    errors = (drawn(99) - TRUTH) / SIZES
    change(errors)
    return TRUTH + errors * SIZES


@pytest.mark.parametrize("seed", range(100, 105))
def test_another_draw_of_the_same_noise_passes(seed: int) -> None:
    verdict = judge(TRUTH, NOISE, drawn(seed))
    assert verdict.passed and verdict.members == MEMBERS and judge_columns([verdict]).passed
    assert verdict.ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("times", [1.2, 10, 1e4])
def test_more_noise_fails(times: float) -> None:
    verdict = judge(TRUTH, NOISE, drawn(100, times * LIMITS["rms"]))
    assert "rms" in verdict.failed and not judge_columns([verdict]).passed


def a_token(errors: np.ndarray) -> None:
    errors[QUIET] = 1.2 * LIMITS["token"] * np.where(np.arange(V) % 2, 1, -1)


def a_logit(errors: np.ndarray) -> None:
    errors[QUIET, 5] = 1.5 * LIMITS["logit"] * PEAK


def the_largest(errors: np.ndarray) -> None:
    errors[LOUD, 5] = 1.2 * LIMITS["largest"] * math.sqrt(NOISE.largest) / SIZES[LOUD, 0]


def a_column(errors: np.ndarray) -> None:
    errors[:, 5] += 1.5 * LIMITS["column"]


def all_tokens(errors: np.ndarray) -> None:
    errors *= 1.2 * LIMITS["rms"]


@pytest.mark.parametrize(
    ("change", "failed"),
    [(a_token, "token"), (a_logit, "logit"), (the_largest, "largest"), (a_column, "column"), (all_tokens, "rms")],
    ids=["one token", "one logit of one token", "where most is rounded", "one logit of all tokens", "all of one case"],
)
def test_each_ratio_sees_what_the_others_miss(change: Callable[[np.ndarray], None], failed: str) -> None:
    verdict = judge(TRUTH, NOISE, changed(change))
    others = [judge(TRUTH, NOISE, drawn(seed)) for seed in range(200, 209)]
    columns = judge_columns([verdict] if change is a_column else [verdict, *others])
    assert (*verdict.failed, *([] if columns.passed else ["column"])) == (failed,)
    assert columns.passed or columns.logit == 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(value: float) -> None:
    def spoil(errors: np.ndarray) -> None:
        errors[3, 3] = value

    def never() -> Noise:
        raise AssertionError("no member can excuse this")

    verdict = judge(TRUTH, NOISE, changed(spoil), never)
    assert set(verdict.failed) == LIMITS.keys() - {"column"} and verdict.got.non_finite == 1
    assert not judge_columns([judge(TRUTH, NOISE, drawn(99)), verdict]).passed


def test_the_largest_values_fail_too() -> None:
    assert not judge(TRUTH, NOISE, np.sign(TRUTH) * np.finfo(np.float32).max).passed


class Asked:
    """More members, and how often they were asked for."""

    def __init__(self, truth: np.ndarray, noise: Noise, more: Sequence[np.ndarray]) -> None:
        self.times, self._given = 0, (truth, noise, more)

    def __call__(self) -> Noise:
        self.times += 1
        truth, noise, more = self._given
        return noise.joined(truth, more)


def unlucky(share: float) -> tuple[np.ndarray, Noise, Asked]:
    """A token whose rounding the first members hardly show, while of `share` of the others each shows all of it."""
    direction = np.where(np.arange(V) % 2, 1.0, -1.0)

    def member(seed: int, size: float) -> np.ndarray:
        logits = drawn(seed)
        logits[17] = TRUTH[17] + size * SIZES[17] * direction
        return logits

    noise = Noise.of(TRUTH, [member(seed, 0.1) for seed in range(MEMBERS)], EPS)
    more = [member(300 + i, 10.0 if i < share * MORE else 0.1) for i in range(MORE)]
    return member(400, 5.0), noise, Asked(TRUTH, noise, more)


def test_a_refusal_is_judged_again_with_more_members() -> None:
    got, noise, again = unlucky(0.25)
    assert judge(TRUTH, noise, got).failed == ("token", "logit")
    verdict = judge(TRUTH, noise, got, again)
    assert verdict.passed and again.times == 1 and verdict.members == MEMBERS + MORE


def test_a_fault_stays_refused_with_more_members() -> None:
    got, noise, again = unlucky(0.0)
    verdict = judge(TRUTH, noise, got, again)
    assert verdict.failed == ("token", "logit") and again.times == 1 and verdict.members == MEMBERS + MORE


@pytest.mark.parametrize("scale", [1.0, 2 * CLEAR * LIMITS["rms"]], ids=["passed", "far off"])
def test_no_more_members_run_where_they_could_change_nothing(scale: float) -> None:
    again = Asked(TRUTH, NOISE, [])
    judge(TRUTH, NOISE, drawn(100, scale), again)
    assert again.times == 0


def test_columns_are_judged_again_too() -> None:
    def members(numbers: range, size: float) -> list[np.ndarray]:
        noisy = [drawn(500 + number) for number in numbers]
        for logits in noisy:
            logits[:, 5] = TRUTH[:, 5] + size * (logits[:, 5] - TRUTH[:, 5])
        return noisy

    noise = Noise.of(TRUTH, members(range(MEMBERS), 0.3), EPS)
    verdicts = [judge(TRUTH, noise, drawn(99)), judge(TRUTH, NOISE, drawn(98))]
    asked = []

    def again(size: float) -> list[Noise]:
        asked.append(size)
        return [noise.joined(TRUTH, members(range(MORE), size)), NOISE.joined(TRUTH, members(range(MORE), 1.0))]

    alone = verdicts[:1]
    assert not judge_columns(alone).passed and judge_columns(alone).logit == 5
    assert judge_columns(alone, lambda: again(1.0)[:1]).passed
    assert not judge_columns(alone, lambda: again(0.3)[:1]).passed
    assert judge_columns(verdicts, lambda: again(1.0)).passed and asked == [1.0, 0.3]


EXACT = np.random.default_rng(3).integers(-8, 9, (N, V)).astype(np.float64)


@pytest.mark.parametrize(
    ("truth", "got", "passed"),
    [
        (EXACT, EXACT, True),
        (EXACT, EXACT * (1 + EPS), True),
        (EXACT, EXACT * (1 + 10 * EPS), False),
        (EXACT, EXACT + (np.indices(EXACT.shape).sum(0) == 0), False),
        (np.full((N, V), 3.0), np.full((N, V), 3.0 + 3 * EPS), True),
        (np.full((N, V), 3.0), np.full((N, V), 3.001), False),
        (np.zeros((N, V)), np.zeros((N, V)), True),
        (np.zeros((N, V)), np.full((N, V), 1e-30), False),
        (np.eye(N, V), np.eye(N, V), True),
        (np.eye(N, V), np.eye(N, V)[:, ::-1], False),
    ],
    ids=[
        "exact", "one unit in the last place", "ten units", "one logit is another", "constant", "another constant",
        "zero", "not zero", "one-hot", "another one-hot",
    ],
)  # fmt: skip
def test_where_pytorch_is_exact_the_last_place_is_the_measure(truth: np.ndarray, got: np.ndarray, passed: bool) -> None:
    noise = Noise.of(truth, [truth] * MEMBERS, EPS)
    verdict = judge(truth, noise, got, lambda: noise.joined(truth, [truth] * MORE))
    assert verdict.passed == passed
    assert passed <= judge_columns([verdict]).passed


def test_one_exact_token_among_others_is_neither_an_alarm_nor_a_hole() -> None:
    members = [drawn(seed) for seed in range(MEMBERS)]
    for logits in members:
        logits[17] = TRUTH[17]
    noise = Noise.of(TRUTH, members, EPS)
    got = drawn(99)
    for times, passed in ((1, True), (30, False)):
        got[17] = TRUTH[17] * (1 + times * EPS)
        verdict = judge(TRUTH, noise, got)
        assert verdict.passed == passed and ("token" in verdict.failed) != passed


@pytest.mark.parametrize("count", [1, 7, ENOUGH - 1])
def test_few_tokens_are_judged_as_if_the_missing_ones_were_right(count: int) -> None:
    truth, members = TRUTH[:count], [drawn(seed)[:count] for seed in range(MEMBERS)]
    noise, error = Noise.of(truth, members, EPS), drawn(99)[:count] - TRUTH[:count]
    most = LIMITS["rms"] * math.sqrt(ENOUGH / count)
    for times, passed in ((0.7, True), (1.4, False)):
        verdict = judge(truth, noise, truth + times * most * error)
        assert verdict.passed == passed, verdict.ratios
    assert judge_columns([judge(truth, noise, truth + error)]).passed


def test_an_allowance_is_the_unit_of_every_ratio() -> None:
    wide = Noise.of(TRUTH, [drawn(seed) for seed in range(MEMBERS)], EPS, allowance=3.0)
    narrow, allowed = (judge(TRUTH, noise, drawn(99)) for noise in (NOISE, wide))
    assert {name: 3 * ratio for name, ratio in allowed.ratios.items()} == pytest.approx(narrow.ratios)
    assert 3 * judge_columns([allowed]).ratio == pytest.approx(judge_columns([narrow]).ratio)


def test_near_ties_are_excused_and_other_flips_are_not() -> None:
    truth = np.array([[1.0, 1.0 - 1e-6, 0.0], [1.0, 0.5, 0.0]])
    tie = np.array([[1.0 - 1e-6, 1.0, 0.0], [1.0, 0.5, 0.0]])
    flip = np.array([[1.0, 1.0 - 1e-6, 0.0], [0.5, 1.0, 0.0]])
    assert measure(truth, tie, allowed=1e-6).flips == 0
    assert measure(truth, flip, allowed=1e-6).flips == 1


def test_the_measures_are_what_they_say() -> None:
    truth, got = np.array([[0.0, math.log(3.0)]]), np.array([[0.0, 0.0]])
    measures = measure(truth, got, allowed=0)
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    assert measures.kl == pytest.approx(float((p * np.log(p / q)).sum()))
    assert measures.max_abs == pytest.approx(math.log(3)) and measures.relative == pytest.approx(1)
    a, b = np.array([[1.0, 2.0, 2.0]]), np.array([[2.0, 1.0, 2.0]])
    assert measure(a, b, allowed=0).cosine == pytest.approx(1 - 8 / 9)
    assert set(METRICS) == {"max_abs", "relative", "cosine", "kl", "flips", "non_finite"}


@pytest.mark.parametrize("got", [TRUTH[:10], TRUTH[:, :10]])
def test_unequal_shapes_and_nothing_are_errors(got: np.ndarray) -> None:
    with pytest.raises(ParityError):
        judge(TRUTH, NOISE, got)
    with pytest.raises(ParityError):
        measure(TRUTH[:0], got[:0], 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_yardstick_that_is_not_finite_is_an_error(value: float) -> None:
    bad = np.where(np.indices(TRUTH.shape).sum(0) == 0, value, TRUTH)
    for made in (
        partial(Noise.of, bad, [TRUTH], EPS), partial(Noise.of, TRUTH, [TRUTH, bad], EPS),
        partial(NOISE.joined, TRUTH, [bad]),
    ):  # fmt: skip
        with pytest.raises(ParityError, match="PyTorch itself"):
            made()


def test_the_limits_are_read_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(judging.LIMITS, "rms", 0.5)
    assert judge(TRUTH, NOISE, drawn(99)).failed == ("rms",)
