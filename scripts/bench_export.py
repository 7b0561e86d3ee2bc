#!/usr/bin/env python
"""Measure export (wall time, peak memory) and inference (ONNX Runtime against torch eager, FoPE against its RoPE twin).

    scripts/bench_export.py                  the paper's 60M shape; writes scripts/results/bench_export.json
    scripts/bench_export.py --shape 180M --out FILE

Weights are random. All backends run in turn within each round, and ratios are medians over rounds, so that a machine
whose speed drifts does not favour anybody. Both sides compute the logits of every position.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fope_export.backends.base import Backend, feeds_for
from fope_export.backends.choose import read_machine
from fope_export.backends.eager import EagerBackend
from fope_export.backends.ort import OrtBackend
from fope_export.bundle import Bundle
from fope_export.config import ModelConfig
from fope_export.fope import frequencies
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.model.native import save

SHAPES = {"60M": (512, 8, 8), "180M": (1024, 8, 8)}
"""Hidden size, heads, layers of the paper's models; trained at 512."""
LENGTH, VOCABULARY, THETA = 512, 50304, 10_000.0
DECODED = 24
RESULTS = Path(__file__).parent / "results"


def write_checkpoint(shape: str, kind: str, folder: Path) -> int:
    """A native checkpoint with random weights; returns the bytes of its weights."""
    hidden, heads, layers = SHAPES[shape]
    head_dim = hidden // heads
    torch.manual_seed(0)
    if kind == "rope":
        rope = Spectrum.rope(frequencies.exponential(THETA, head_dim).numpy(), head_dim)
        rotaries = [FopeRotary.from_spectrum(rope) for _ in range(layers)]
    else:
        rotaries = [FopeRotary.create(head_dim=head_dim, groups=heads, training_length=LENGTH) for _ in range(layers)]
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, norm_eps=1e-6, tie_embeddings=False, training_length=LENGTH, rope_theta=THETA,
        floored=kind == "fope", eos_token_id=0, pad_token_id=1, spectrum=rotaries[0].config,
    )  # fmt: skip
    model = Decoder(config).requires_grad_(False)
    for attention, rotary in zip(model.attentions(), rotaries, strict=True):
        attention.rotary = rotary
    folder.mkdir()
    save(model, folder)
    return sum(p.numel() * 4 for p in model.parameters())


def timed_export(checkpoint: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak MiB of `fope-export export` in a process of its own."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "fope_export.cli", "export", str(checkpoint), str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the export of {checkpoint} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def prefill(backend: Backend, length: int) -> float:
    """Seconds for `length` tokens at once."""
    feeds = feeds_for(np.random.default_rng(0).integers(0, VOCABULARY, (1, length)))
    started = time.perf_counter()
    backend.step(feeds, backend.empty_cache(1))
    return time.perf_counter() - started


def decode(backend: Backend, past: int) -> float:
    """Seconds for one token after `past` others, the mean of DECODED greedy steps."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, past))
    logits, cache = backend.step(feeds_for(ids), backend.empty_cache(1))
    started = time.perf_counter()
    for i in range(DECODED):
        token = logits[:, -1:].argmax(-1)
        logits, cache = backend.step(feeds_for(token, np.ones((1, past + 1 + i), np.int64)), cache)
    return (time.perf_counter() - started) / DECODED


CASES: dict[str, Callable[[Backend], float]] = {
    "decode, past 128": lambda backend: decode(backend, 128),
    "decode, past 1024": lambda backend: decode(backend, 1024),
    "prefill 512": lambda backend: prefill(backend, 512),
    "prefill 2048": lambda backend: prefill(backend, 2048),
}


def compare(backends: dict[str, Backend], rounds: int, console: Console) -> dict[str, Any]:
    """Milliseconds (medians) and ratios (medians of rounds) for every case."""
    results = {}
    for case, run in CASES.items():
        seconds: dict[str, list[float]] = {name: [] for name in backends}
        with console.status(case):
            for backend in backends.values():
                run(backend)
            for _ in range(rounds):
                for name, backend in backends.items():
                    seconds[name].append(run(backend))

        def ratio(slow: str, fast: str, seconds: dict[str, list[float]] = seconds) -> float:
            return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

        results[case] = {
            "milliseconds": {name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()},
            "speed_over_eager_fope": round(ratio("torch FoPE", "ONNX FoPE"), 3),
            "speed_over_eager_rope": round(ratio("torch RoPE", "ONNX RoPE"), 3),
            "time_fope_over_rope": round(ratio("ONNX FoPE", "ONNX RoPE"), 3),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--exports", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_export.json")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {kind: write_checkpoint(args.shape, kind, folder / kind) for kind in ("fope", "rope")}
        exports = []
        with console.status("export"):
            timed_export(folder / "rope", folder / "rope-bundle")
            exports = [timed_export(folder / "fope", folder / "fope-bundle") for _ in range(args.exports)]
        seconds, peak = (statistics.median(values) for values in zip(*exports, strict=True))
        backends: dict[str, Backend] = {}
        for kind, label in (("fope", "FoPE"), ("rope", "RoPE")):
            backends[f"torch {label}"] = EagerBackend(load_checkpoint(folder / kind).model)
            backends[f"ONNX {label}"] = OrtBackend(Bundle.open(folder / f"{kind}-bundle"))
        cases = compare(backends, args.rounds, console)
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
        "rounds": args.rounds,
        "inference": cases,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    show(record)
    print(args.out)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def show(record: dict[str, Any]) -> None:
    export = record["export"]
    print(f"export: {export['seconds']} s, {export['peak_MiB']} MiB, {export['peak_over_weights']} x the weights")
    table = Table(
        "case", *next(iter(record["inference"].values()))["milliseconds"], "ORT / eager", "FoPE / RoPE", box=None
    )
    for case, found in record["inference"].items():
        times = [f"{value:.1f} ms" for value in found["milliseconds"].values()]
        ratios = [f"{found[name]:.2f}" for name in ("speed_over_eager_fope", "time_fope_over_rope")]
        table.add_row(case, *times, *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
