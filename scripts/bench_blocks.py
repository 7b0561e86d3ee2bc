#!/usr/bin/env python
"""Measure what the block costs and saves: of weights of 4 and 8 bits, in accuracy and in the time of decoding.

    scripts/bench_blocks.py                  writes scripts/results/blocks.json

Accuracy is the shipped FoPE model's: growth of the perplexity of held-out Python, and divergence from the checkpoint's
prediction, with inputs of linear layers as they are, and rounded to 8 bits as the optimized file does. Time is that of
the optimized file at the paper's 60M shape, past 128 tokens, and of each of its kinds of matrices alone, in as many
copies as leave the nearer caches. All take turns within each round on one thread, whose time it is.
"""

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from bench_export import RESULTS, prompt
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import read_machine
from fope_export.backends.ort import open_session
from fope_export.backends.ort_optimized import OptimizedOrtBackend, OrtSlots
from fope_export.bench_report import processor
from fope_export.benchmark.rounds import in_turn
from fope_export.benchmark.shapes import SHAPES, VOCABULARY, write_checkpoint
from fope_export.config import ExportConfig
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import loss_by_length
from fope_export.graph.builder import MICROSOFT
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.graph.quantize import INT8, OPERATOR
from fope_export.model.checkpoint import source_of
from fope_export.parity.quantized import cost_of
from fope_export.quantizations import COMPENSATED, NEAREST, QUANTIZATIONS
from fope_export.shipped import shipped

KINDS, BLOCKS = {"int4": 4, "int8": 8}, (32, 64, 128, 256)
SCORED, PAST, STEPS = 1 << 16, 128, 8
ROOM = 8 << 20
"""Bytes of weights, at least, of one kind of matrices that are multiplied by."""


def quality(folder: Path) -> list[dict[str, Any]]:
    """Of each kind, block and rounding: growth in percent and divergence, of both files."""
    text = as_tokens(python_source(held_out=True))[: SCORED + 1]
    model, rows = source_of(export(shipped("fope"), folder / "shipped")).model, []
    trained = model.config.training_length
    loss = loss_by_length(EagerBackend(model), text, [trained])[trained]
    for kind, rounding, block in itertools.product(KINDS, (NEAREST, COMPENSATED), BLOCKS):
        config = msgspec.convert({"quantize": kind, "block": block, "rounding": rounding}, ExportConfig)
        bundle = export(shipped("fope"), folder / "rounded", config)
        row: dict[str, Any] = {"kind": kind, "block": block, "rounding": rounding}
        for inputs in ("inputs as they are", "inputs in 8 bits"):
            backend = load_backend(bundle)
            grown = math.expm1(loss_by_length(backend, text, [trained])[trained] - loss)
            cost = cost_of(bundle, model, backend)
            row[inputs] = {"growth_percent": round(100 * grown, 3), "mean_kl_nats": float(f"{cost.kl:.3g}")}
            bundle = optimize(bundle)
        row["limit_percent"] = 100 * QUANTIZATIONS[kind].growth
        rows.append(row)
    return rows


def decoding(folder: Path, shape: str) -> dict[str, Callable[[], float]]:
    """Seconds of this thread for a token, by kind and block; weights are random, which costs the same."""
    write_checkpoint(shape, "fope", folder / "checkpoint")
    tasks: dict[str, Callable[[], float]] = {}
    for kind, block in itertools.product(KINDS, BLOCKS):
        config = msgspec.convert({"quantize": kind, "block": block, "rounding": NEAREST}, ExportConfig)
        bundle = optimize(export(folder / "checkpoint", folder / f"{kind} {block}", config))
        slots = OptimizedOrtBackend(bundle, threads=1).slots(1, 2 * PAST)
        slots.prefill(0, prompt(PAST), 0)
        tasks[f"{kind} {block}"] = partial(a_token, slots)
    return tasks


def a_token(slots: OrtSlots) -> float:
    """Seconds of this thread for one, a mean over STEPS."""
    slots.lengths[0] = PAST
    return seconds(lambda: slots.decode([0], [1])) / STEPS


def seconds(step: Callable[[], Any]) -> float:
    """Of this thread, for STEPS of them."""
    started = time.thread_time()
    for _ in range(STEPS):
        step()
    return time.thread_time() - started


def multiplying(inputs: int, outputs: int) -> dict[str, Callable[[], float]]:
    """The same for a token's product with one matrix, by kind and block."""
    tasks: dict[str, Callable[[], float]] = {}
    x = np.random.default_rng(0).standard_normal((1, 1, inputs), np.float32)
    for (kind, bits), block in itertools.product(KINDS.items(), BLOCKS):
        copies = max(ROOM // (inputs * outputs), 1)
        shape = (outputs, inputs // block, block * bits // 8)
        session = open_session(_products(copies, inputs, bits, block, shape), threads=1)
        tasks[f"{kind} {block}"] = partial(a_product, session, x, copies)
    return tasks


def a_product(session: Any, x: NDArray[np.float32], copies: int) -> float:
    """Seconds of this thread for one of as many copies."""
    return seconds(lambda: session.run(None, {"x": x})) / STEPS / copies


def _products(copies: int, inputs: int, bits: int, block: int, shape: tuple[int, int, int]) -> bytes:
    """A graph of products of one token with as many matrices."""
    rng, nodes, tensors, made = np.random.default_rng(0), [], [], []
    sizes: dict[str, Any] = {"K": inputs, "N": shape[0], "bits": bits, "block_size": block, "accuracy_level": INT8}
    for i in range(copies):
        arrays = rng.integers(0, 256, shape, np.uint8), rng.uniform(0.01, 0.03, shape[:2]).astype(np.float32)
        names = [f"integers.{i}", f"steps.{i}"]
        tensors += [onnx.numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)]
        nodes.append(onnx.helper.make_node(OPERATOR, ["x", *names], [f"y.{i}"], domain=MICROSOFT, **sizes))
        made.append(onnx.helper.make_tensor_value_info(f"y.{i}", onnx.TensorProto.FLOAT, (1, 1, shape[0])))
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 1, inputs))
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(MICROSOFT, 1)]
    graph = onnx.helper.make_graph(nodes, "products", [x], made, tensors)
    content: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


def timed(tasks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Median in milliseconds, and the quartiles of the ratio to the first within a round."""
    in_turn(tasks, 2)
    times = in_turn(tasks, rounds)
    first = np.array(next(iter(times.values())))
    return {
        name: {
            "milliseconds": round(1e3 * float(np.median(each)), 4),
            "over_first": [round(float(x), 3) for x in np.percentile(np.array(each) / first, (25, 50, 75))],
        }
        for name, each in times.items()
    }


def matrices(shape: str) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each kind of linear layer."""
    hidden = SHAPES[shape][0]
    return {
        "att_proj": (hidden, 3 * hidden), "attn_out": (hidden, hidden), "ff_proj": (hidden, 8 * hidden),
        "ff_out": (4 * hidden, hidden), "lm_head": (hidden, VOCABULARY),
    }  # fmt: skip


def shown(record: Mapping[str, Any]) -> Iterable[Table]:
    first, *_ = record["quality"]
    files = [name for name in first if name.startswith("inputs")]
    table = Table("shipped model", *(f"growth, % / mean KL, {name}" for name in files), box=None)
    for row in record["quality"]:
        cells = (f"{row[name]['growth_percent']:.2f} / {row[name]['mean_kl_nats']:.2g}" for name in files)
        table.add_row(f"{row['kind']} {row['block']} {row['rounding']}", *cells)
    yield table
    speed = {"a token": record["decoding"], **record["matrices"]}
    table = Table(record["shape"], *record["decoding"], box=None)
    for what, each in speed.items():
        table.add_row(
            what, *(f"{cell['milliseconds']:.3g} ms, x {cell['over_first'][1]:.2f}" for cell in each.values())
        )
    yield table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "blocks.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Console(stderr=True).status("perplexity") as status:
        measured = quality(Path(name))
        status.update("decoding")
        token = timed(decoding(Path(name), args.shape), args.rounds)
        status.update("matrices")
        each = {what: timed(multiplying(*sizes), args.rounds) for what, sizes in matrices(args.shape).items()}
    machine = msgspec.to_builtins(read_machine()) | {"processor": processor()}
    machine["load"] = [round(load, 1) for load in os.getloadavg()]  # of 1, 5 and 15 minutes
    record = {"machine": machine, "quality": measured, "shape": args.shape, "decoding": token, "matrices": each}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=160).print(*shown(record), args.out)


if __name__ == "__main__":
    main()
