#!/usr/bin/env python
"""Measure the memory of a very long prompt fed in chunks, on the shipped model in ONNX Runtime.

    scripts/bench_long.py                    131,072 tokens; writes scripts/results/bench_long.json (5 minutes)
    scripts/bench_long.py --length 16384 --chunk 512

The file is the optimized one, which writes its cache in place: the portable one's grows in every step by slightly
larger blocks than the last step freed, and takes 1.7 times the bound at 16,384 tokens. What is counted is the peak
above what the process held before the prompt. The bound is what must be there: the cache, and for attention over one
chunk a score for each head, new token and slot, as much for its softmax, and the mask. Where both fit, a prompt fed
whole gives the same logits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from fope_export.backends.machine import read_machine
from fope_export.backends.ort_optimized import OptimizedOrtBackend
from fope_export.benchmark.contenders import ALLOWED
from fope_export.bundle import Bundle
from fope_export.corpus import as_tokens, python_source
from fope_export.generation import prefill
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.manifest import OPTIMIZED
from fope_export.shipped import shipped

RESULTS = Path(__file__).parent / "results"
BOTH_FIT = 8192
"""Tokens at which the prompt is also fed whole."""
SAME = ALLOWED["fp32"]
"""Largest difference of logits that another order of summation explains."""


def status(name: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def bound(bundle: Bundle, length: int, chunk: int) -> int:
    """Bytes that a chunk at the prompt's end may take above the loaded model."""
    config = bundle.manifest.decoder()
    cache = 2 * config.num_layers * config.num_kv_heads * config.spectrum.head_dim * length * 4
    scores = config.num_heads * chunk * length * 4
    mask = chunk * length * (4 + 4 + 1)
    return cache + 2 * scores + mask


def measure(path: Path, length: int, chunk: int) -> dict[str, float]:
    """One prompt, in this process."""
    bundle = Bundle.open(path)
    backend = OptimizedOrtBackend(bundle)
    text = as_tokens(python_source(held_out=True))
    tokens = np.resize(text, length).astype(np.int64)
    prefill(backend.slots(1), 0, tokens[:chunk], 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = status("VmRSS"), time.perf_counter()
    logits = prefill(backend.slots(1, length), 0, tokens, chunk)
    seconds = time.perf_counter() - started
    peak = status("VmHWM") - before
    whole, parts = (prefill(backend.slots(1), 0, tokens[:BOTH_FIT], size) for size in (0, chunk))
    return {
        "peak_MiB": round(peak / 2**20), "bound_MiB": round(bound(bundle, length, chunk) / 2**20),
        "seconds": round(seconds, 1), "finite": bool(np.isfinite(logits).all()),
        "largest_difference_from_whole": float(np.abs(whole - parts).max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_long.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.length, args.chunk)))
        return
    with tempfile.TemporaryDirectory() as name:
        optimize(export(shipped("fope"), Path(name) / "out"))
        sizes = ["--length", str(args.length), "--chunk", str(args.chunk)]
        command = [sys.executable, __file__, "--measure", f"{name}/out", *sizes]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout)
    print(measured)
    if measured["peak_MiB"] > measured["bound_MiB"]:
        raise SystemExit("more memory than the bound")
    if not measured["finite"] or measured["largest_difference_from_whole"] > SAME:
        raise SystemExit("chunks give other logits than the whole")
    machine = msgspec.to_builtins(read_machine())
    record = {"machine": machine, "file": OPTIMIZED, "tokens": args.length, "chunk": args.chunk} | measured
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
