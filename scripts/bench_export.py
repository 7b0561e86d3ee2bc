#!/usr/bin/env python
"""Measure export (wall time, peak memory) and inference (ONNX Runtime against torch eager, FoPE against its RoPE twin
and against itself with its padding folded).

    scripts/bench_export.py                  the paper's 60M shape; writes scripts/results/bench_export.json
    scripts/bench_export.py --shape 180M --out FILE

Weights are random. ONNX Runtime has the optimized file, and all compute the logits of the last position only; prompts
of 2048 tokens are fed at once, and in chunks as `fope-export run` does. All backends run in turn within each
round, and ratios are medians over all rounds. A process keeps the memory it was given, and some is faster than other,
so the rounds are spread over several sittings: fresh processes, in which the backends are made in turning order.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fope_export.backends.base import Backend, Ids
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import read_machine
from fope_export.bench_report import processor
from fope_export.benchmark.contenders import ALLOWED
from fope_export.benchmark.greedy import distance
from fope_export.benchmark.rounds import in_turn, medians, ratio
from fope_export.benchmark.shapes import SHAPES, VOCABULARY, write_checkpoint
from fope_export.bundle import Bundle
from fope_export.generation import prefill
from fope_export.graph.optimize import optimize
from fope_export.model.checkpoint import load_checkpoint

DECODED = 24
RESULTS = Path(__file__).parent / "results"


def timed_export(checkpoint: Path, out: Path, *options: str) -> tuple[float, float]:
    """Seconds and peak MiB of `fope-export export` in a process of its own.

    The peak is the process's VmHWM: ru_maxrss would also count what this process held when it started the other.
    """
    code = "import sys; from fope_export.cli import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, "export", str(checkpoint), str(out), *options]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    peak = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak) / 1024


def prompt(length: int) -> Ids:
    return np.random.default_rng(0).integers(0, VOCABULARY, length)


def timed_prefill(backend: Backend, length: int, chunk: int) -> float:
    """Seconds for `length` tokens, `chunk` at a time."""
    ids, slots = prompt(length), backend.slots(1, length)
    started = time.perf_counter()
    prefill(slots, 0, ids, chunk)
    return time.perf_counter() - started


def timed_decode(backend: Backend, past: int) -> float:
    """Seconds for one token after `past` others, the mean of DECODED greedy steps."""
    slots = backend.slots(1, past + DECODED)
    logits = prefill(slots, 0, prompt(past), backend.chunk)
    started = time.perf_counter()
    for _ in range(DECODED):
        (logits,) = slots.decode([0], [int(logits.argmax())])
    return (time.perf_counter() - started) / DECODED


CASES: dict[str, Callable[[Backend], float]] = {
    "decode, past 128": lambda backend: timed_decode(backend, 128),
    "decode, past 1024": lambda backend: timed_decode(backend, 1024),
    "prefill 512": lambda backend: timed_prefill(backend, 512, 0),
    "prefill 2048, at once": lambda backend: timed_prefill(backend, 2048, 0),
    "prefill 2048, in chunks": lambda backend: timed_prefill(backend, 2048, backend.chunk),
}


def agree(backends: dict[str, Backend]) -> None:
    """Refuse to time backends that do not compute the same."""
    for one, other in (("torch FoPE", "ONNX FoPE"), ("torch FoPE", "ONNX folded"), ("torch RoPE", "ONNX RoPE")):
        ours, theirs = (prefill(backends[name].slots(1), 0, prompt(64), 0)[None] for name in (one, other))
        if not distance(ours, theirs, ours.argmax(-1)) <= ALLOWED["fp32"]:
            raise SystemExit(f"{one} and {other} do not compute the same: they are not timed")


def eager(folder: Path) -> Backend:
    return EagerBackend(load_checkpoint(folder).model)


def exported(folder: Path) -> Backend:
    return load_backend(Bundle.open(folder))


def sit(folder: Path, turn: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """One sitting: seconds of every round, by case and backend."""
    makers: dict[str, Callable[[], Backend]] = {}
    for kind, label in (("fope", "FoPE"), ("rope", "RoPE")):
        makers[f"torch {label}"] = partial(eager, folder / kind)
        makers[f"ONNX {label}"] = partial(exported, folder / f"{kind}-bundle")
    makers["ONNX folded"] = partial(exported, folder / "folded-bundle")
    first = turn % len(makers)
    names = [*makers][first:] + [*makers][:first]
    backends = {name: makers[name]() for name in names}
    agree(backends)
    seconds: dict[str, dict[str, list[float]]] = {}
    for case, run in CASES.items():
        for backend in backends.values():
            run(backend)
        seconds[case] = in_turn({name: partial(run, backend) for name, backend in backends.items()}, rounds)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds and ratios of one case: medians over the rounds of all sittings."""
    against = {
        "speed_over_eager_fope": ("torch FoPE", "ONNX FoPE"),
        "speed_over_eager_rope": ("torch RoPE", "ONNX RoPE"),
        "time_fope_over_rope": ("ONNX FoPE", "ONNX RoPE"),
        "time_folded_over_fope": ("ONNX folded", "ONNX FoPE"),
    }
    ratios = {name: round(ratio(seconds[a], seconds[b]), 3) for name, (a, b) in against.items()}
    return {"milliseconds": medians(seconds, 3, unit=1e3)} | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--sittings", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="in each sitting")
    parser.add_argument("--exports", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_export.json")
    parser.add_argument("--sit", nargs=2, metavar=("FOLDER", "TURN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sit:
        print(json.dumps(sit(Path(args.sit[0]), int(args.sit[1]), args.rounds)))
        return
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name, console.status("exports") as status:
        folder = Path(name)
        weights = {kind: write_checkpoint(args.shape, kind, folder / kind) for kind in ("fope", "rope")}
        timed_export(folder / "rope", folder / "rope-bundle")
        timed_export(folder / "fope", folder / "folded-bundle", "--fold-padding")
        exports = [timed_export(folder / "fope", folder / "fope-bundle") for _ in range(args.exports)]
        for kind in ("fope", "rope", "folded"):
            optimize(Bundle.open(folder / f"{kind}-bundle"))
        pooled: dict[str, dict[str, list[float]]] = {}
        for turn in range(args.sittings):
            status.update(f"sitting {turn + 1} of {args.sittings}")
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--sit", name, str(turn)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for case, by_backend in json.loads(done.stdout).items():
                for backend, seconds in by_backend.items():
                    pooled.setdefault(case, {}).setdefault(backend, []).extend(seconds)
    seconds, peak = (statistics.median(values) for values in zip(*exports, strict=True))
    machine = msgspec.to_builtins(read_machine())
    record = {
        "machine": machine | {"processor": processor(), "torch_threads": torch.get_num_threads()},
        "shape": args.shape,
        "parameters": weights["fope"] // 4,
        "export": {
            "seconds": round(seconds, 2),
            "peak_MiB": round(peak),
            "peak_over_weights": round(peak * 2**20 / weights["fope"], 2),
        },
        "sittings": args.sittings,
        "rounds": args.sittings * args.rounds,
        "inference": {case: summary(by_backend) for case, by_backend in pooled.items()},
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    show(record)
    print(args.out)


def show(record: dict[str, Any]) -> None:
    export = record["export"]
    print(f"export: {export['seconds']} s, {export['peak_MiB']} MiB, {export['peak_over_weights']} x the weights")
    table = Table(
        "case",
        *next(iter(record["inference"].values()))["milliseconds"],
        "ORT / eager",
        "FoPE / RoPE",
        "folded / FoPE",
        box=None,
    )
    for case, measured in record["inference"].items():
        times = [f"{value:.1f} ms" for value in measured["milliseconds"].values()]
        ratios = [
            f"{measured[name]:.2f}"
            for name in ("speed_over_eager_fope", "time_fope_over_rope", "time_folded_over_fope")
        ]
        table.add_row(case, *times, *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
