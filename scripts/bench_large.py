#!/usr/bin/env python
"""Measure the export of the paper's 1.2B shape: seconds, and peak memory against the weights' bytes.

    scripts/bench_large.py                   float32 and float16; writes scripts/results/bench_large.json

Weights are random float32, in one file of 5.1 GB. A file that is mapped counts towards the peak as far as it was read.
"""

import argparse
import json
import tempfile
from pathlib import Path

import msgspec
from bench_export import RESULTS, timed_export

from fope_export.backends.machine import read_machine
from fope_export.bench_report import processor
from fope_export.benchmark.shapes import write_checkpoint

SHAPE = "1.2B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_large.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        weights = write_checkpoint(SHAPE, "fope", Path(name) / "checkpoint")
        for dtype in ("fp32", "fp16"):
            seconds, peak = timed_export(Path(name) / "checkpoint", Path(name) / "out", "--dtype", dtype)
            row = {"dtype": dtype, "seconds": round(seconds, 1), "peak_MiB": round(peak)}
            rows.append(row | {"peak_over_weights": round(peak * 2**20 / weights, 2)})
            print(rows[-1], flush=True)
    machine = msgspec.to_builtins(read_machine()) | {"processor": processor()}
    record = {"machine": machine, "shape": SHAPE, "parameters": weights // 4, "exports": rows}
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
