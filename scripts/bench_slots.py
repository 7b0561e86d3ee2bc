#!/usr/bin/env python
"""What it costs the others when rows leave and join, and what decoding together saves.

    scripts/bench_slots.py BUNDLE [--rows 8] [--past 2000] [--rounds 15] [--threads 1] [--out FILE]

Of rows with `past` tokens each, in every round in turn: all are decoded, half of them leave, they come back, and each
is decoded by itself. A change costs what the step after it takes beyond the next one of the same rows. Milliseconds
are medians over the rounds, ratios medians of the ratios within a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fope_export.backends.base import Backend
from fope_export.backends.choose import BACKENDS, USUAL, Settings
from fope_export.bench_report import processor
from fope_export.bundle import Bundle
from fope_export.generation import prefill


class Round:
    """The times of one round, in ms."""

    def __init__(self, backend: Backend, rows: int, past: int, rounds: int) -> None:
        self.rows, self.slots = rows, backend.slots(rows, past + 8 * rounds)
        for slot, prompt in enumerate(np.random.default_rng(0).integers(0, backend.vocab_size, (rows, past))):
            prefill(self.slots, slot, prompt, backend.chunk)

    def step(self, *slots: Sequence[int]) -> float:
        """Of one step for each of some sets of rows."""
        started = time.perf_counter()
        for each in slots:
            self.slots.decode(each, [1] * len(each))
        return 1e3 * (time.perf_counter() - started)

    def times(self) -> dict[str, float]:
        everyone, half = range(self.rows), range(self.rows // 2)
        self.step(everyone)
        step = self.step(everyone)
        left, without = self.step(half), self.step(half)
        joined, again = self.step(everyone), self.step(everyone)
        ends = self.step((0, self.rows - 1))
        return {
            "a step": step, "leaving": left - without, "joining": joined - again,
            "the first and the last row": ends, "each by itself": self.step(*([slot] for slot in everyone)),
        }  # fmt: skip


def measure(bundle: Bundle, rows: int, past: int, rounds: int, threads: int) -> dict[str, dict[str, dict[str, float]]]:
    """Of every variant that the bundle has."""
    variants = {}
    for variant in BACKENDS[USUAL].variants_of(bundle):
        one = Round(variant.load(bundle, Settings(threads=threads)), rows, past, rounds)
        one.times()
        taken = [one.times() for _ in range(rounds)]
        variants[variant.name] = {
            name: {
                "ms": round(statistics.median(each[name] for each in taken), 2),
                "of a step": round(statistics.median(each[name] / each["a step"] for each in taken), 3),
            }
            for name in taken[0]
        }
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name, default in {"rows": 8, "past": 2000, "rounds": 15, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_slots.json")
    args = parser.parse_args()
    variants = measure(Bundle.open(args.bundle), args.rows, args.past, args.rounds, args.threads)
    for variant, rows in variants.items():
        for name, row in rows.items():
            print(f"{variant:10} {name:28} {row['ms']:8.2f} ms, {row['of a step']:6.3f} of a step")
    sizes = {name: getattr(args, name) for name in ("rows", "past", "rounds", "threads")}
    args.out.write_text(json.dumps({"processor": processor(), **sizes, "variants": variants}, indent=1) + "\n")


if __name__ == "__main__":
    main()
