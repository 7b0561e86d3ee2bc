#!/usr/bin/env python
"""Measure `validate`: time, and peak memory of all its processes against the bytes of the weights that are compared.

    scripts/bench_validate.py --size 180M --lengths 1,64 --folder /tmp             the paper's shapes, in float32
    scripts/bench_validate.py --size 6GB --dtype bf16 --lengths 1,64,512 --training-length 512 --folder DISK
    scripts/bench_validate.py --size 180M --lengths 1,64 --folder /tmp --before CHECKOUT

The second is of 3 billion parameters, drawn in bfloat16 and in a shard for each layer, as `bench_stream.py` has them.
With `--before` the code of another checkout of this repository validates the same bundle first. Memory and threads are
as `bench_stream.py` says; what lies on the disk meanwhile is in the folder too, and gone at the end.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from bench_stream import SIZES, config_of, measured, write_checkpoint

from fope_export.backends.machine import read_machine
from fope_export.bench_report import processor
from fope_export.benchmark import shapes
from fope_export.dtypes import DTYPES
from fope_export.scratch import scratch

RESULTS = Path(__file__).parent / "results" / "bench_validate.jsonl"


def parameters_of(size: str, length: int, folder: Path) -> int:
    """How many numbers the checkpoint has that is written to the folder."""
    if size in shapes.SHAPES:
        return shapes.write_checkpoint(size, "fope", folder) // torch.float32.itemsize
    return write_checkpoint(config_of(size, max_position_embeddings=length), folder)[0]


def measure(size: str, length: int, dtype: str, lengths: str, folder: Path, before: Path | None) -> dict[str, Any]:
    """Everything, in one run; the folder is another's to empty."""
    parameters, out = parameters_of(size, length, folder / "checkpoint"), str(folder / "out")
    measured("export", str(folder / "checkpoint"), out, "--dtype", dtype)
    row = DTYPES[dtype]
    weights = parameters * ((row.widened or row).itemsize)
    record: dict[str, Any] = {"size": size, "dtype": dtype, "lengths": lengths, "weights_MiB": weights >> 20}
    record |= {"training_length": length} if size in SIZES else {}
    for name, checkout in {"before": before, "validate": None}.items():
        if name == "validate" or checkout:
            found = measured("validate", out, "--lengths", lengths, checkout=checkout)
            record[name] = found | {"peak_over_weights": round((found["peak_MiB"] << 20) / weights, 2)}
    if before:
        record["seconds_over_before"] = round(record["validate"]["seconds"] / record["before"]["seconds"], 2)
    return record | {"load": round(os.getloadavg()[1], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*shapes.SHAPES, *SIZES], default="180M", help="of the checkpoint")
    parser.add_argument("--training-length", type=int, default=4096, help="of a size in bytes")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the export")
    parser.add_argument("--lengths", default="1,64", help="of the prefills")
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for all")
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a line of JSON is added to it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    with scratch(args.folder) as folder:
        os.environ["TMPDIR"] = str(folder)
        record = measure(args.size, args.training_length, args.dtype, args.lengths, folder, args.before)
    machine = msgspec.to_builtins(read_machine()) | {"processor": processor()}
    with args.out.open("a") as file:
        file.write(json.dumps(record | {"machine": machine}) + "\n")
    json.dump(record, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
