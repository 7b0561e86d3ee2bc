#!/usr/bin/env python
"""Measure bundles beside PyTorch, ONNX Runtime GenAI, Optimum, OpenVINO GenAI and llama.cpp, at the paper's 60M and
180M shapes.

    scripts/bench_peers.py                   all kinds of weights; writes scripts/results/bench_peers.json
    scripts/bench_peers.py --shapes 60M --kinds fp32 --only openvino --only "openvino genai fp32"

Weights are random; a bundle is timed after it was validated on a prompt. Peers run a RoPE twin, exported by their own
exporters. The record has one part for each shape and kind of weights, as `fope-export bench --json` prints it; parts
that are not measured again stay.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fope_export.bench_report import bench_record, print_bench
from fope_export.benchmark.contenders import PEERS
from fope_export.benchmark.run import BenchConfig, bench
from fope_export.benchmark.shapes import SHAPES, write_checkpoint
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph.export import export
from fope_export.graph.optimize import ONNXRUNTIME, OPENVINO, optimize
from fope_export.parity.cases import prefill, save_inputs
from fope_export.parity.run import validate
from fope_export.report import write_parity
from fope_export.terminal import RESULTS, Stages, stages

VALIDATED = 64
"""Tokens of that prompt."""
OUT = Path(__file__).parent / "results" / "bench_peers.json"
KINDS = {
    "fp32": ExportConfig(), "bf16": ExportConfig(dtype="bf16"), "int8": ExportConfig(quantize="int8"),
    "int4": ExportConfig(quantize="int4"),
}  # fmt: skip


def made(checkpoint: Path, kind: str, stage: Stages) -> Bundle:
    """The bundle, which `--keep` may have left."""
    if (folder := checkpoint.with_name(f"{checkpoint.name}-{kind}")).exists():
        return Bundle.open(folder)
    stage("exporting")
    bundle = export(checkpoint, folder, KINDS[kind])
    if KINDS[kind].quantize:  # and the cache too: each contender takes what it has
        tokens = checkpoint.with_name("tokens.npy")
        np.save(tokens, np.random.default_rng(0).integers(0, bundle.manifest.decoder().vocab_size, (4, 512)))
        bundle = optimize(bundle, ONNXRUNTIME, cache="int8", calibration=tokens)
    else:
        bundle = optimize(bundle, ONNXRUNTIME)
    bundle = optimize(bundle, OPENVINO)
    stage("validating")
    inputs = checkpoint.with_name("inputs.json")
    save_inputs(inputs, bundle.manifest, [prefill(bundle.manifest.decoder(), VALIDATED, 0)])
    return write_parity(bundle, validate(bundle, load=inputs))


def measure(checkpoint: Path, kind: str, config: BenchConfig, stage: Stages) -> dict[str, Any]:
    """One bundle: exported, validated, timed."""
    bundle = made(checkpoint, kind, stage)
    result = bench(bundle, config, stage=stage)
    stage.finish()
    print_bench(bundle, result, RESULTS)
    record: dict[str, Any] = msgspec.to_builtins(bench_record(bundle, result))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["60M", "180M"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--only", action="append", default=[], help="as `fope-export bench --only`")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 1024, 2048])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sittings", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--keep", type=Path, help="folder in which checkpoints and validated bundles stay for later runs"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    config = BenchConfig(
        lengths=tuple(args.lengths), batch=tuple(args.batch), rounds=args.rounds, sittings=args.sittings,
        threads=args.threads,
        peers=PEERS, only=tuple(args.only),
    )  # fmt: skip
    records: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            checkpoint = (args.keep or Path(name)) / shape
            if not checkpoint.exists():
                write_checkpoint(shape, "fope", checkpoint)
            for kind in args.kinds:
                with stages(f"{shape}, {kind}") as stage:
                    record = measure(checkpoint, kind, config, stage)
                records[f"{shape}, {kind}"] = {"shape": shape, "kind": kind} | record
                args.out.parent.mkdir(exist_ok=True)
                args.out.write_text(json.dumps(records, indent=2) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
