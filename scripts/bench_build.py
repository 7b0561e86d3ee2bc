#!/usr/bin/env python
"""Measure how long engines take to build, without a GPU: TensorRT-RTX, with the plugin and without it.

    scripts/bench_build.py                   the paper's 60M shape; writes scripts/results/bench_build.json

Weights are random. The plugin is compiled anew, into a cache of its own.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import get_args

import msgspec
from bench_export import RESULTS
from rich.console import Console
from rich.table import Table

from fope_export.backends.machine import read_machine
from fope_export.bench_report import processor
from fope_export.benchmark.shapes import SHAPES, write_checkpoint
from fope_export.config import BuildConfig, CacheName, ExportConfig
from fope_export.graph.export import export
from fope_export.tensorrt import compile
from fope_export.tensorrt.build import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_build.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name, Console(stderr=True).status("builds") as status:
        folder = Path(name)
        os.environ["FOPE_EXPORT_CACHE"] = str(folder / "cache")
        started = time.perf_counter()
        compile.build_plugin(compile.find_toolchain(), ("86", "89", "120"))
        compiled = time.perf_counter() - started
        write_checkpoint(args.shape, "fope", folder / "checkpoint")
        for dtype, cache in product(("fp16", "bf16"), get_args(CacheName)):
            config = ExportConfig(dtype=dtype, cache=cache)
            bundle = export(folder / "checkpoint", folder / f"{dtype}-{cache}", config)
            for plugin in (True, False):
                status.update(f"{dtype}, {cache} cache, {'plugin' if plugin else 'no plugin'}")
                started = time.perf_counter()
                bundle, record = build(bundle, BuildConfig(plugin=plugin))
                seconds = round(time.perf_counter() - started, 2)
                measured = {"dtype": dtype, "cache": cache, "plugin_layers": record.plugin_layers, "seconds": seconds}
                rows.append(measured | {"phases": record.seconds, "plan_MB": round(record.plan_bytes / 1e6, 1)})
    machine = msgspec.to_builtins(read_machine()) | {"processor": processor()}
    result = {
        "machine": machine, "shape": args.shape, "gpus": BuildConfig().architectures,
        "plugin_compiled_in_seconds": round(compiled, 2), "builds": rows,
    }  # fmt: skip
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("dtype", "cache", "plugin layers", "seconds", "plan, MB", box=None)
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("dtype", "cache", "plugin_layers", "seconds", "plan_MB")))
    Console().print(f"the plugin was compiled in {compiled:.1f} s", table, args.out, sep="\n")


if __name__ == "__main__":
    main()
