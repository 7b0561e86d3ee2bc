#!/usr/bin/env python
"""What rounded keys and values save and cost: memory, decoding and prompts, beside the same model's exact ones.

    scripts/bench_cache.py [--shape 60M] [--lengths 1024,8192,131072] [--rounds 15] [--quantize int4] [--out FILE]

Weights are random. In every round, in turn, each of a runtime's two caches, which hold as many tokens as `length`
says, decodes some tokens and takes a chunk of a prompt after them. What fills a cache are the keys and values of its
first tokens, again and again: how long attention takes does not depend on what they are. Times are of the processor,
on one thread: medians over the rounds; ratios are of one round each, their median with its interval at 95 % confidence.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from fope_export.backends.choose import BACKENDS, Settings, Variant
from fope_export.backends.openvino import PagedSlots
from fope_export.backends.ort_optimized import OrtSlots
from fope_export.bench_report import processor
from fope_export.benchmark.rounds import in_turn, interval, medians, ratios
from fope_export.benchmark.shapes import SHAPES, write_checkpoint
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.quantizations import CACHES, QUANTIZATIONS

RUNTIMES = ("onnxruntime", "openvino")
FILLED = 512
"""Tokens that are computed before they are repeated."""
DECODED, CHUNK = 4, 128
"""Tokens of a round: one after the other, and together."""


def made(shape: str, quantize: str | None, folder: Path) -> Bundle:
    """A bundle with everybody's files, calibrated on random tokens."""
    write_checkpoint(shape, "fope", folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 50_000, 2 * FILLED))
    bundle = export(folder / "model", folder / "out", ExportConfig(quantize=quantize))
    row = next(iter(CACHES))
    return optimize(optimize(bundle, cache=row, calibration=folder / "ids.npy"), "openvino")


class Cache:
    """One row of `length` tokens in one of a runtime's variants."""

    def __init__(self, bundle: Bundle, variant: Variant, length: int) -> None:
        self.length, self.backend = length, variant.load(bundle, Settings(threads=1))
        made = self.backend.slots(1, length + DECODED + CHUNK)
        self.slots = cast("OrtSlots | PagedSlots", made)
        self.tokens = np.random.default_rng(1).integers(0, self.backend.vocab_size, FILLED)
        self.slots.prefill(0, self.tokens, 0)
        for tensor in self.slots.tensors:
            self._repeat(tensor)

    def _repeat(self, tensor: Any) -> None:
        """Fill all of a cache with what its first tokens are."""
        axis = 0 if isinstance(self.slots, PagedSlots) else 2
        first = FILLED // cast("Any", self.backend).page if axis == 0 else FILLED
        places = np.moveaxis(tensor, axis, 0)
        for start in range(first, len(places), first):
            places[start : start + first] = places[: min(first, len(places) - start)]

    @property
    def megabytes(self) -> float:
        """Of the tokens that it holds."""
        room = max(self.slots.tensors[0].shape[2], 1) if isinstance(self.slots, OrtSlots) else self._room
        return round(sum(tensor.nbytes for tensor in self.slots.tensors) * self.length / room / 1e6, 1)

    @property
    def _room(self) -> int:
        return len(self.slots.tensors[0]) * int(cast("Any", self.backend).page)

    def time(self) -> dict[str, float]:
        """Seconds of a token, and of a chunk."""
        self.slots.lengths[0] = self.length
        begun = time.process_time()
        for token in range(DECODED):
            self.slots.decode([0], [token])
        between = time.process_time()
        self.slots.prefill(0, self.tokens[:CHUNK], self.length)
        return {"token": (between - begun) / DECODED, "chunk": time.process_time() - between}

    def close(self) -> None:
        self.slots.close()
        self.backend.close()


def measure(bundle: Bundle, runtime: str, length: int, rounds: int) -> dict[str, Any]:
    """A runtime's rounded cache beside its exact one."""
    *_, exact, rounded = BACKENDS[runtime].variants_of(bundle)
    with closing(Cache(bundle, exact, length)) as one, closing(Cache(bundle, rounded, length)) as other:
        tasks: dict[str, Callable[[], dict[str, float]]] = {"exact": one.time, "rounded": other.time}
        for task in tasks.values():
            task()
        taken = in_turn(tasks, rounds)
        return {"MB": {"exact": one.megabytes, "rounded": other.megabytes}} | {
            name: _compared({who: [each[name] for each in times] for who, times in taken.items()})
            for name in ("token", "chunk")
        }


def _compared(times: dict[str, list[float]]) -> dict[str, Any]:
    ratio = interval(ratios(times["rounded"], times["exact"]))
    return {"ms": medians(times, 3, unit=1e3), "rounded / exact": [round(each, 3) for each in ratio]}


def lines(length: int, runtime: str, found: dict[str, Any]) -> Iterator[str]:
    """For people."""
    yield f"{length:,} tokens, {runtime}: {found['MB']['exact']:,} MB become {found['MB']['rounded']:,}"
    for name, what in (("token", "decoding one"), ("chunk", f"a prompt's next {CHUNK}")):
        middle, low, high = found[name]["rounded / exact"]
        ms = found[name]["ms"]
        yield f"  {what}: {ms['exact']:.2f} ms become {ms['rounded']:.2f}, x{middle:.2f} [{low:.2f}-{high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--lengths", type=lambda text: [*map(int, text.split(","))], default=[1024, 8192, 131_072])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quantize", choices=QUANTIZATIONS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_cache.json")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "processor": processor(), "threads": 1, "shape": args.shape, "quantize": args.quantize, "rounds": args.rounds,
        "chunk": CHUNK, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        one = partial(measure, made(args.shape, args.quantize, Path(name)), rounds=args.rounds)
        for length in args.lengths:
            for runtime in RUNTIMES:
                found = record["cases"].setdefault(str(length), {})[runtime] = one(runtime, length)
                print("\n".join(lines(length, runtime, found)), flush=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
