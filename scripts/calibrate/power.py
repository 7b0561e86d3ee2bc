"""The smallest strength of each planted fault that is refused: by the rule, and by the former one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from calibrate import today
from calibrate.faults import FAULTS, Effect, Fault, Scene
from calibrate.models import Recipe, bundle_of, pool
from calibrate.records import Book, Record
from calibrate.runs import Bench, as_formerly
from fope_export.parity.cases import Floats
from fope_export.parity.judge import Verdict, judge_columns
from fope_export.parity.yardstick import Look

SEEDS = 20
MODELS = (
    ("count 2", "float32", "portable"),
    ("count 8", "float32", "optimized"),
    ("count 50", "int4", "portable"),
    ("count 60", "fp16", "optimized"),
)
FINE = 8
"""Strengths are this many to a factor of ten."""
WEAKEST, STRONGEST = -10 * FINE, 3 * FINE


@dataclass(frozen=True)
class Right:
    """What a right export of one model gives, and what that is held against."""

    looks: list[Look]
    got: list[Floats]
    noisy: list[Floats]
    """Of PyTorch, in the former rule's cases."""
    alone: list[Floats]
    """The export's own logits there."""
    allowance: float

    @classmethod
    def of(cls, bench: Bench, file: str) -> "Right":
        backend, alone = bench.files[file], [as_formerly(case) for case in bench.cases]
        return cls(
            [bench.yardstick.look(case) for case in bench.cases],
            [case.run(backend) for case in bench.cases],
            [case.run(bench.former) for case in alone],
            [case.run(backend) for case in alone],
            bench.yardstick.allowance,
        )

    @cached_property
    def verdicts(self) -> list[Verdict]:
        return [look.judge(got) for look, got in zip(self.looks, self.got, strict=True)]

    def refuses(self, effect: Effect, strength: float) -> bool:
        """Whether the rule does."""
        verdicts = [
            self.looks[i].judge(self.got[i] + strength * effect[i]) if i in effect else verdict
            for i, verdict in enumerate(self.verdicts)
        ]
        if not all(verdict.passed for verdict in verdicts):
            return True
        return not judge_columns(verdicts, lambda: [look.again() for look in self.looks]).passed

    def formerly_refuses(self, effect: Effect, strength: float, raised: Mapping[str, float]) -> bool:
        """Whether the former rule does, with its limits raised so many times."""
        for i, added in effect.items():
            noisy, got = self.noisy[i], self.alone[i]
            wrong = got + strength * added[: len(got)]
            shares = today.shares(self.looks[i].truth[: len(got)], noisy, wrong, self.allowance)
            if not all(shares[name] <= raised[name] for name in shares):
                return True
        return False


def least(refused: Callable[[float], bool]) -> float | None:
    """The smallest strength that is refused, where larger ones are too; None where the largest is not."""
    low, high = WEAKEST, STRONGEST
    if not refused(10 ** (high / FINE)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refused(10 ** (middle / FINE)) else (middle, high)
    return float(f"{10 ** (high / FINE):.3g}")


def raises(records: list[Record]) -> dict[str, float]:
    """How many times each of the former rule's limits is to be raised so that it refuses no counted right export."""
    given = [line["former"] for line in records if "ratios" in line]
    return {name: max(1.0, *(each[name] for each in given)) for name in given[0]} if given else {}


def try_all(book: Book, work: Path, until: float) -> None:
    """Add what the book lacks, a model after the other."""
    known = {tuple(line["power"]) for line in book.records() if "power" in line}
    recipes = {model.name: model for model in pool("count") if isinstance(model, Recipe)}
    for name, kind, file in MODELS:
        for seed in range(SEEDS):
            wanted = [fault for fault in FAULTS if (name, kind, file, seed, fault.name) not in known]
            if wanted and time.monotonic() < until:
                _try(recipes[name], kind, file, seed, wanted, book, work)


def _try(recipe: Recipe, kind: str, file: str, seed: int, faults: list[Fault], book: Book, work: Path) -> None:
    bench = Bench.of(bundle_of(recipe, kind, work), (), 1000 + seed, 1)
    right, raised = Right.of(bench, file), raises(book.records())
    for fault in faults:
        rng = np.random.default_rng((seed, FAULTS.index(fault)))
        scene = Scene(bench.yardstick.double, bench.cases, [look.truth for look in right.looks], rng)
        effect = {i: added / fault.made for i, added in fault.effect(scene).items()}
        book.add({"power": [recipe.name, kind, file, seed, fault.name]} | _strengths(right, effect, raised))


def _strengths(right: Right, effect: Effect, raised: Mapping[str, float]) -> Record:
    """By the rule, by the former one, and by that with its limits raised, which later runs may raise further."""
    plain = dict.fromkeys(raised, 1.0)
    return {
        "least": least(lambda strength: right.refuses(effect, strength)),
        "former": least(lambda strength: right.formerly_refuses(effect, strength, plain)),
        "raised": least(lambda strength: right.formerly_refuses(effect, strength, raised)),
        "by": raised,
    }
