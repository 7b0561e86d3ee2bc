#!/usr/bin/env python
"""Draw the pictures of README and docs.

scripts/figures.py loss     measures the shipped models: loss by length of context, in PyTorch and from the ONNX,
                            passkeys found, and parity; writes scripts/results/loss_by_length.json and
                            docs/loss_and_parity.png
scripts/figures.py speed    reads scripts/results/bench_peers.json; writes docs/speed.png and prints the table of
                            docs/benchmarks.md
"""

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

from fope_export import plots
from fope_export.backends.choose import load_backend
from fope_export.backends.machine import read_machine
from fope_export.benchmark.contenders import OURS
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import evaluate, loss_by_length
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.parity.cases import FACTORS
from fope_export.parity.results import ParityResult
from fope_export.parity.run import validate
from fope_export.shipped import NAMES, PASSKEY_NAMES, shipped

SCORED = 1 << 18
ROOT = Path(__file__).parent.parent
RESULT = ROOT / "scripts/results/bench_peers.json"
BACKENDS = ("torch", "onnxruntime")
SHOWN = ("torch", "torch.compile", "onnxruntime", OURS, "genai", "genai fp32", "optimum fp32")
TABLE = {
    "fp32": {
        "torch.compile": "torch.compile",
        "portable file": "onnxruntime",
        "**optimized file**": OURS,
        "**optimized file in GenAI**": "genai",
        "RoPE twin, optimized file": f"{OURS}, RoPE twin",
        "RoPE twin, GenAI": "genai fp32",
        "RoPE twin, Optimum": "optimum fp32",
    },
    "int4": {
        "**optimized file, int4**": OURS,
        "**optimized file in GenAI, int4**": "genai",
        "RoPE twin, GenAI int4": "genai int4",
    },
}
"""Rows of the table in docs/benchmarks.md, by the weights of the bundle that they were measured beside."""
COLUMNS = (
    ("60M", "decode_over_eager", (128, 1024)),
    ("180M", "decode_over_eager", (128, 1024)),
    ("60M", "prefill_over_eager", (512, 2048)),
    ("180M", "prefill_over_eager", (512, 2048)),
    ("60M", "peak_MiB", (128, 1024)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=("loss", "speed"))
    {"loss": loss, "speed": speed}[parser.parse_args().picture]()


def speed() -> None:
    cells = json.loads(RESULT.read_text())["60M, fp32"]["cells"]
    prefill, decode = (
        {name: {c["length"]: c[speed] for c in cells if c["contender"] == name} for name in SHOWN}
        for speed in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )
    plots.save(plots.speeds_figure(prefill, decode), ROOT / "docs/speed.png")
    print_table(json.loads(RESULT.read_text()))


def print_table(record: dict[str, Any]) -> None:
    """In Markdown."""
    cells = {
        (part["shape"], part["kind"], cell["contender"], cell["length"]): cell
        for part in record.values()
        for cell in part["cells"]
    }
    for kind, rows in TABLE.items():
        for label, name in rows.items():
            pairs = [[cells[shape, kind, name, n][what] for n in lengths] for shape, what, lengths in COLUMNS]
            told = [" / ".join(f"{x:,}" if isinstance(x, int) else f"{x:.2f}" for x in pair) for pair in pairs]
            print("|", " | ".join([label, *told]), "|")


def loss() -> None:
    text = as_tokens(python_source(held_out=True))[: SCORED + 1]
    console = Console(stderr=True)
    losses: dict[str, dict[str, dict[int, float]]] = {}
    parity: ParityResult | None = None
    trained = 0
    for name, label in NAMES.items():
        with tempfile.TemporaryDirectory() as folder, console.status(label):
            bundle = export(shipped(name), Path(folder) / name)
            trained = bundle.manifest.decoder().training_length
            lengths = [trained * factor for factor in FACTORS]
            losses[label] = {b: loss_by_length(load_backend(bundle, b), text, lengths) for b in BACKENDS}
            parity = parity or validate(bundle)
    assert parity is not None
    console.print("passkeys")
    with tempfile.TemporaryDirectory() as folder:
        found = {
            label: evaluate(optimize(export(shipped(name), Path(folder) / name)))
            for name, label in PASSKEY_NAMES.items()
        }
    accuracy = {label: each.accuracy for label, each in found.items()}
    record = {
        "machine": msgspec.to_builtins(read_machine()),
        "text": f"{SCORED} bytes of the held-out standard library",
        "training_length": trained,
        "nats_per_byte": losses,
        "passkeys": {label: msgspec.to_builtins(each.found) for label, each in found.items()},
        "passkey_accuracy": accuracy,
        "training": {
            n: json.loads((files("fope_export") / "data" / n / "training.json").read_text())
            for n in (*NAMES, *PASSKEY_NAMES)
        },
    }
    (ROOT / "scripts/results").mkdir(exist_ok=True)
    (ROOT / "scripts/results/loss_by_length.json").write_text(json.dumps(record, indent=2) + "\n")
    (ROOT / "docs").mkdir(exist_ok=True)
    plots.save(picture(losses, accuracy, parity, trained), ROOT / "docs/loss_and_parity.png")


def picture(
    losses: dict[str, dict[str, dict[int, float]]], accuracy: dict[str, dict[int, float]], parity: ParityResult,
    trained: int,
) -> Figure:  # fmt: skip
    """Loss on the left, passkeys beside it, parity on the right."""
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(16, 4.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(5, 5, 6))
        plots.draw_loss(left, {label: by_backend["onnxruntime"] for label, by_backend in losses.items()}, trained)
        left.set_title("Loss beyond the training length, from the ONNX", fontsize=11, loc="left")
        plots.draw_passkeys(middle, accuracy, trained)
        middle.set_title("Passkeys found, from the ONNX", fontsize=11, loc="left")
        plots.draw_error(right, parity, trained)
        right.set_title("Error against float64: ours, and wrong models", fontsize=11, loc="left", pad=40)
    return figure


if __name__ == "__main__":
    main()
