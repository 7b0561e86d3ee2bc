"""Rounds are fair, and what is read off them is a median."""

import math
import random
from functools import partial

import pytest

from fope_export.benchmark.rounds import in_turn, interval, medians, ratio, turns


@pytest.mark.parametrize(
    ("names", "rounds", "wanted"),
    [("abc", 4, ["abc", "bca", "cab", "abc"]), ("a", 2, ["a", "a"]), ("", 2, ["", ""]), ("abc", 0, [])],
)
def test_each_round_is_begun_by_another(names: str, rounds: int, wanted: list[str]) -> None:
    assert ["".join(order) for order in turns(names, rounds)] == wanted


def test_everybody_runs_once_in_every_round() -> None:
    ran, begun = list[str](), list[int]()

    def run(name: str) -> int:
        ran.append(name)
        return len(ran)

    results = in_turn({name: partial(run, name) for name in "ab"}, 3, begin=begun.append)
    assert "".join(ran) == "abbaab" and results == {"a": [1, 4, 5], "b": [2, 3, 6]} and begun == [0, 1, 2]


def test_one_slow_round_moves_no_median() -> None:
    assert medians({"a": [0.001, 0.5, 0.0024]}, 1, unit=1e3) == {"a": 2.4}
    assert ratio([2.0, 90.0, 9.0], [1.0, 30.0, 3.0]) == 3.0
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    """Of numbers of a skewed distribution, whose median is known; and its ends are the ranks that tables have."""
    assert interval(range(1, 31)) == (15.5, 10, 21) and interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    draw = random.Random(0).expovariate
    held = sum(
        low <= math.log(2) <= high for _, low, high in (interval([draw(1) for _ in range(30)]) for _ in range(800))
    )
    assert 0.93 < held / 800 <= 1
