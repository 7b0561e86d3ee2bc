#!/usr/bin/env python
"""Measure what quantization costs in perplexity, and what weights of 4 and 8 bits save in time in ONNX Runtime.

    scripts/bench_quantized.py               writes scripts/results/quantized.json

Perplexity, per byte of held-out Python at the training length, is the shipped FoPE model's. Speed and size are those of
the paper's 60M shape with random weights, of the portable file and of the optimized one, which rounds what products of
integer weights read; all run in turn within each round, and ratios are medians over the rounds.
"""

import argparse
import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import bench_export
import msgspec
from bench_export import CASES, RESULTS
from rich.console import Console
from rich.table import Table

from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import read_machine
from fope_export.bench_report import processor
from fope_export.benchmark.rounds import in_turn, medians, ratio
from fope_export.benchmark.shapes import SHAPES, write_checkpoint
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import loss_by_length
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.checkpoint import source_of
from fope_export.parity.quantized import cost_of
from fope_export.shipped import shipped

KINDS = {
    "fp32": ExportConfig(),
    "fp16": ExportConfig(dtype="fp16"),
    "int8": ExportConfig(quantize="int8"),
    "int4": ExportConfig(quantize="int4"),
    "int8-qdq": ExportConfig(quantize="int8-qdq"),
    "int8-qdq fp16": ExportConfig(quantize="int8-qdq", dtype="fp16"),
    "fp8-qdq": ExportConfig(quantize="fp8-qdq"),
    "fp8-qdq fp16": ExportConfig(quantize="fp8-qdq", dtype="fp16"),
    "int4-awq": ExportConfig(quantize="int4-awq"),
    "nvfp4": ExportConfig(quantize="nvfp4"),
}
TIMED = ("fp32", "int8", "int4")
OPTIMIZED = ", optimized"
SCORED = 1 << 16
TASKS = ("decode, past 128", "decode, past 1024", "prefill 512")


def size(bundle: Bundle) -> float:
    """Of the model in MB."""
    return round(sum(path.stat().st_size for path in bundle.path.glob("model.onnx*")) / 1e6, 2)


def quality(folder: Path) -> dict[str, Any]:
    """Perplexity, its growth over fp32's, divergence and size of the shipped model, by kind."""
    text, plain = as_tokens(python_source(held_out=True))[: SCORED + 1], 0.0
    kinds: dict[str, dict[str, Any]] = {}
    for kind, config in KINDS.items():
        bundle = export(shipped("fope"), folder / f"shipped {kind}", config)
        trained, backend = source_of(bundle).config.training_length, load_backend(bundle)
        perplexity = math.exp(loss_by_length(backend, text, [trained])[trained])
        plain = plain or perplexity
        growth = round(100 * (perplexity / plain - 1), 3)
        kinds[kind] = {"perplexity": round(perplexity, 5), "growth_percent": growth, "model_MB": size(bundle)}
        kinds[kind]["written"] = bundle.manifest.export.described
        if config.quantize:
            model = source_of(bundle).model.converted(config)
            kinds[kind]["mean_kl_nats"] = float(f"{cost_of(bundle, model, backend).kl:.3g}")
    loss = loss_by_length(EagerBackend(source_of(bundle).model), text, [trained])[trained]
    return {"scored_bytes": SCORED, "context": trained, "pytorch_perplexity": round(math.exp(loss), 5), "kinds": kinds}


def speed(folder: Path, shape: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each task by kind, and the medians of the ratios to fp32's within a round."""
    parameters = write_checkpoint(shape, "fope", folder / "checkpoint") // 4
    bundles = {kind: export(folder / "checkpoint", folder / kind, KINDS[kind]) for kind in TIMED}
    sizes = {kind: size(bundle) for kind, bundle in bundles.items()}
    backends = {kind: load_backend(bundle) for kind, bundle in bundles.items()}
    backends |= {kind + OPTIMIZED: load_backend(optimize(bundle)) for kind, bundle in bundles.items()}
    tasks = {}
    for task in TASKS:
        for backend in backends.values():
            CASES[task](backend)
        timed = in_turn({kind: partial(CASES[task], backend) for kind, backend in backends.items()}, rounds)
        tasks[task] = {
            "milliseconds": medians(timed, 2, unit=1e3),
            "speed_over_fp32": {kind: round(ratio(timed["fp32"], each), 2) for kind, each in timed.items()},
        }
    return {"shape": shape, "parameters": parameters, "rounds": rounds, "model_MB": sizes, "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decoded", type=int, default=6, help="tokens of each decode")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantized.json")
    args = parser.parse_args()
    bench_export.DECODED = args.decoded
    with tempfile.TemporaryDirectory() as name, Console(stderr=True).status("perplexity") as status:
        measured = quality(Path(name))
        status.update("speed")
        timed = speed(Path(name), args.shape, args.rounds)
    machine = msgspec.to_builtins(read_machine()) | {"processor": processor()}
    machine["load"] = [round(load, 1) for load in os.getloadavg()]  # of 1, 5 and 15 minutes
    record = {"machine": machine, "shipped": measured, "speed": timed}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    quality_table = Table("shipped model", "perplexity", "growth, %", "mean KL", "MB", box=None)
    for kind, each in measured["kinds"].items():
        names = ("perplexity", "growth_percent", "mean_kl_nats", "model_MB")
        quality_table.add_row(kind, *(str(each.get(column, "")) for column in names))
    speed_table = Table(args.shape, *timed["tasks"][TASKS[0]]["milliseconds"], box=None)
    for task, each in timed["tasks"].items():
        cells = (f"{ms} ms, x {each['speed_over_fp32'][kind]}" for kind, ms in each["milliseconds"].items())
        speed_table.add_row(task, *cells)
    Console(width=160).print(quality_table, speed_table, timed["model_MB"], args.out)


if __name__ == "__main__":
    main()
