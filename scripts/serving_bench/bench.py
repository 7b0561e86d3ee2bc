"""What the sections share: how much is measured, and how numbers are told."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving_bench.made import Made
from serving_bench.processes import Clients

Record = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """`quick` is a trial of the whole way, whose numbers say nothing."""

    made: Made
    clients: Clients
    threads: int
    quick: bool

    def few(self, whole: int, trial: int) -> int:
        return trial if self.quick else whole


def spread(values: Sequence[float], digits: int = 3) -> Record:
    """The median of some rounds, and the least and the greatest of them."""
    median, least, greatest = statistics.median(values), min(values), max(values)
    return {"median": round(median, digits), "of rounds": [round(least, digits), round(greatest, digits)]}


def ratio(over: Sequence[float], under: Sequence[float]) -> Record:
    """One over the other, within a round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def share(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def body(prompt: Sequence[int] | str, new: int, **fields: Any) -> Record:
    """A request whose answer has `new` tokens, whatever they are."""
    return {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True} | fields


def answered(load: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Its answers. Raises RuntimeError where a request did not get one."""
    if wrong := [each for each in load["answers"] if each["status"] != 200]:
        raise RuntimeError(f"{len(wrong)} requests were not answered: {str(wrong[0])[:500]}")
    return list(load["answers"])
