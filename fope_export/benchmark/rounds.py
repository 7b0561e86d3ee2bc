"""Rounds: everybody in turn within each, each begun by another; and what is read off them. Standard library only."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")


def turns(names: Sequence[K], rounds: int) -> Iterator[list[K]]:
    """The order of each round."""
    for number in range(rounds):
        start = number % max(len(names), 1)
        yield [*names[start:], *names[:start]]


def in_turn(
    tasks: Mapping[K, Callable[[], T]],
    rounds: int,
    *,
    pause: float = 0.0,
    begin: Callable[[int], None] = lambda number: None,
) -> dict[K, list[T]]:
    """What each task gives in every round, with `pause` seconds after it; `begin` is told a round's number."""
    results: dict[K, list[T]] = {name: [] for name in tasks}
    for number, order in enumerate(turns([*tasks], rounds)):
        begin(number)
        for name in order:
            results[name].append(tasks[name]())
            time.sleep(pause)
    return results


def medians(times: Mapping[K, Sequence[float]], digits: int, *, unit: float = 1.0) -> dict[K, float]:
    """The median of every contender's rounds, times `unit`."""
    return {name: round(unit * statistics.median(each), digits) for name, each in times.items()}


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a over b within each round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """a over b within a round, the median over the rounds."""
    return float(statistics.median(ratios(a, b)))


def interval(found: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the ends of where it lies at 95 % confidence: two of the numbers, as many from either end as
    chance allows, whatever their distribution. Of fewer than six, the least and the largest.
    """
    ordered, count = sorted(found), len(found)
    tail, rank = 0.5**count, 0
    while tail + math.comb(count, rank + 1) * 0.5**count <= 0.025:
        rank += 1
        tail += math.comb(count, rank) * 0.5**count
    return float(statistics.median(ordered)), ordered[rank], ordered[-1 - rank]
