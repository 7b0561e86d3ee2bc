#!/usr/bin/env python
"""Measure float16 bundles in ONNX Runtime on a GPU beside PyTorch there, eager and compiled, at the paper's shapes.

    scripts/bench_cuda.py                    60M and 180M; writes scripts/results/bench_cuda.json
    scripts/bench_cuda.py --shapes 60M --rounds 3

Weights are random. First the model that comes along is validated on the GPU, and each bundle on a prompt of 32 tokens:
wrong numbers are not timed. The record has one part for each shape, as `fope-export bench --json` prints it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fope_export.backends.base import feeds_for
from fope_export.bench_report import bench_record, print_bench
from fope_export.benchmark.run import BenchConfig, bench
from fope_export.benchmark.shapes import SHAPES, VOCABULARY, write_checkpoint
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.parity.cases import Case, save_inputs
from fope_export.parity.results import ParityResult
from fope_export.parity.run import validate
from fope_export.report import parity_record, write_parity
from fope_export.terminal import RESULTS, Stages, stages

OUT = Path(__file__).parent / "results" / "bench_cuda.json"
SHIPPED = Path(__file__).parent.parent / "fope_export" / "data" / "fope"
HALF = ExportConfig(dtype="fp16")

CUDA = "onnxruntime-cuda"


def exported(checkpoint: Path, out: Path) -> Bundle:
    return optimize(export(checkpoint, out, HALF))


def validated(bundle: Bundle, **options: Any) -> ParityResult:
    """Raises SystemExit with what failed."""
    result = validate(bundle, backend=CUDA, **options)
    write_parity(bundle, result)
    if not result.passed:
        failed = {case.name: case.verdict.failed for case in result.cases if not case.verdict.passed}
        raise SystemExit(f"{bundle.path} fails on the GPU: {failed or result.broken or 'a control passed'}")
    return result


def measure(shape: str, folder: Path, config: BenchConfig, stage: Stages) -> dict[str, Any]:
    """One shape: exported, validated, timed."""
    stage("exporting")
    parameters = write_checkpoint(shape, "fope", folder / "checkpoint") // 4
    bundle = exported(folder / "checkpoint", folder / "bundle")
    stage("validating")
    feeds = feeds_for(np.random.default_rng(0).integers(1, VOCABULARY, (1, 32)))
    save_inputs(folder / "inputs.json", bundle.manifest, [Case("prompt", feeds, (32,), 32)])
    validated(bundle, load=folder / "inputs.json")
    result = bench(Bundle.open(bundle.path), config, stage=stage)
    stage.finish()
    print_bench(bundle, result, RESULTS)
    known: dict[str, Any] = msgspec.to_builtins(bench_record(bundle, result))
    return {"shape": shape, "parameters": parameters} | known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["60M", "180M"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    config = BenchConfig(
        lengths=tuple(args.lengths), batch=tuple(args.batch), rounds=args.rounds, device="cuda", backends=(CUDA,)
    )
    records: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        with stages("shipped model") as stage:
            stage("validating")
            shipped = exported(SHIPPED, Path(name) / "shipped")
            records["parity"] = msgspec.to_builtins(parity_record(shipped, validated(shipped)))
        args.out.write_text(json.dumps(records, indent=2) + "\n")
        for shape in args.shapes:
            folder = Path(name) / shape
            folder.mkdir()
            with stages(shape) as stage:
                records[shape] = measure(shape, folder, config, stage)
            args.out.write_text(json.dumps(records, indent=2) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
