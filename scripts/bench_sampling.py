#!/usr/bin/env python
"""What a draw costs a row, beside the same draw with the whole vocabulary sorted.

    scripts/bench_sampling.py [--vocabulary 50304] [--rows 8] [--rounds 40] [--out FILE]

All settings and both ways take turns within every round; milliseconds are medians over the rounds, ratios medians of
the ratios within a round.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from fope_export.benchmark.rounds import in_turn, medians, ratio
from fope_export.serving.sampling import Draw, SamplingParams, sample

Way = Callable[[np.ndarray, Sequence[Draw]], list[int]]
SETTINGS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "temperature, top-k": SamplingParams(temperature=0.8, top_k=50),
    "temperature, top-p": SamplingParams(temperature=0.8, top_p=0.95),
    "temperature, top-k, top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "all of them, penalties": SamplingParams(
        temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.5
    ),
}


def sorting(logits: np.ndarray, draws: Sequence[Draw]) -> list[int]:
    """The same draws, plainly: without penalties."""
    return [_sorted_draw(row.astype(np.float64), draw) for row, draw in zip(logits, draws, strict=True)]


def _sorted_draw(logits: np.ndarray, draw: Draw) -> int:
    sampling = draw.sampling
    order = np.argsort(-logits, kind="stable")
    if sampling.temperature == 0:
        return int(order[0])
    order = order[: sampling.top_k or None]
    scaled = (logits[order] - logits[order[0]]) / sampling.temperature
    odds = np.exp(scaled)
    kept = int(np.searchsorted(odds.cumsum() / odds.sum(), sampling.top_p)) + 1
    noise = np.random.Generator(np.random.Philox(key=draw.place)).gumbel(size=len(logits))
    return int(order[:kept][(scaled + noise[order])[:kept].argmax()])


def seconds(way: Way, logits: np.ndarray, draws: Sequence[Draw]) -> float:
    started = time.perf_counter()
    way(logits, draws)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_sampling.json")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((args.rows, args.vocabulary))).astype(np.float32)
    prompt, made = rng.integers(0, args.vocabulary, 500).tolist(), dict.fromkeys(range(200), 2)
    places = count()

    def timed(way: Way, sampling: SamplingParams) -> float:
        place = next(places)
        return seconds(way, logits, [Draw(sampling, place, row, prompt, made) for row in range(args.rows)])

    tasks = {
        (name, way): partial(timed, way, sampling) for name, sampling in SETTINGS.items() for way in (sample, sorting)
    }
    taken = in_turn(tasks, args.rounds)
    milliseconds = medians(taken, 3, unit=1e3 / args.rows)
    rows = {
        name: {
            "ms a row": milliseconds[name, sample],
            "of sorting": round(ratio(taken[name, sample], taken[name, sorting]), 3),
        }
        for name in SETTINGS
    }
    for name, row in rows.items():
        print(f"{name:28} {row['ms a row']:7.3f} ms a row, {row['of sorting']:.2f} of sorting everything")
    sizes = {"vocabulary": args.vocabulary, "rows": args.rows, "rounds": args.rounds, "numpy": np.__version__}
    args.out.write_text(json.dumps(sizes | {"settings": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
