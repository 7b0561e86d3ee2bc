#!/usr/bin/env python
"""A mixture of experts beside a dense model of the size that a token uses of it, at Qwen3-MoE's proportions.

    scripts/bench_experts.py                 128 experts, 8 of them a token; writes scripts/results/bench_experts.json
    scripts/bench_experts.py --quantize int4 --rounds 5

Weights are random. Three files are timed in turn within each round, in one process: the mixture's portable file, in
which every expert computes every token, its optimized one, and the dense model's optimized one. A backend with one
thread computes in the thread that calls it, whose processor time is taken: what else the machine does counts little.
Milliseconds are medians over the rounds; ratios are medians of the ratios within a round, with their quartiles.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fope_export.backends.base import Backend, Ids
from fope_export.backends.choose import Settings, load_backend
from fope_export.backends.machine import read_machine
from fope_export.bench_report import processor
from fope_export.benchmark.rounds import in_turn, medians
from fope_export.bundle import Bundle
from fope_export.config import ExpertsConfig, ExportConfig, ModelConfig
from fope_export.fope.rotary import FopeRotary
from fope_export.generation import prefill
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.decoder import Decoder
from fope_export.model.layouts.native import save

HIDDEN, HEADS, VOCABULARY, LENGTH, DECODED = 512, 8, 8192, 512, 8
EXPERTS, CHOSEN, WIDTH = 128, 8, 192
"""Qwen3-MoE's, but for the width: there, too, it is 3/8 of the hidden one."""
CACHES = 1 << 27
"""Bytes that a processor's caches do not hold."""
BEFORE, AFTER, DENSE = "every expert", "chosen experts", "dense"


def write_model(folder: Path, layers: int, *, mixed: bool) -> None:
    """A native checkpoint: a mixture, or what is dense and as wide as the experts of a token together."""
    torch.manual_seed(0)
    rotaries = [FopeRotary.create(head_dim=64, groups=HEADS, training_length=LENGTH) for _ in range(layers)]
    experts = ExpertsConfig(
        count=EXPERTS, per_token=CHOSEN, intermediate_size=WIDTH, groups=1, normalize=True, layers=(*range(layers),)
    )
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=CHOSEN * WIDTH, num_layers=layers,
        num_heads=HEADS, num_kv_heads=HEADS, norm_eps=1e-6, tie_embeddings=False, training_length=LENGTH,
        rope_theta=1e4, floored=True, eos_token_id=0, pad_token_id=1, spectrum=rotaries[0].config,
        experts=experts if mixed else None,
    )  # fmt: skip
    model = Decoder(config).requires_grad_(False)
    for attention, rotary in zip(model.attentions(), rotaries, strict=True):
        attention.rotary = rotary
    for parameter in model.parameters():
        if parameter.dim() == 3 and len(parameter) == EXPERTS:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    folder.mkdir()
    save(model, folder)


def prompt(length: int) -> Ids:
    return np.random.default_rng(0).integers(0, VOCABULARY, length)


def decoded(backend: Backend, past: int, *, cold: bool) -> float:
    """Processor seconds of one token after `past` others, the mean of some. If it is `cold`, no weight is in a cache,
    as none is where the model is of a useful size.
    """
    slots, seconds, other = backend.slots(1, past + DECODED), 0.0, np.zeros(CACHES // 4 if cold else 1, np.float32)
    prefill(slots, 0, prompt(past), backend.chunk)
    for token in prompt(DECODED):
        other += cold
        started = time.thread_time()
        slots.decode([0], [int(token)])
        seconds += time.thread_time() - started
    return seconds / DECODED


def prefilled(backend: Backend, length: int) -> float:
    """Processor seconds of a prompt at once."""
    ids, slots = prompt(length), backend.slots(1, length)
    started = time.thread_time()
    prefill(slots, 0, ids, 0)
    return time.thread_time() - started


CASES: dict[str, Callable[[Backend], float]] = {
    "decode, past 128": partial(decoded, past=128, cold=True),
    "decode, weights in caches": partial(decoded, past=128, cold=False),
    "prefill 32": partial(prefilled, length=32),
    "prefill 512": partial(prefilled, length=512),
}


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """First quartile, median and third of a over b."""
    return [round(each, 3) for each in statistics.quantiles([x / y for x, y in zip(a, b, strict=True)])]


def measure(mixture: Bundle, dense: Bundle, rounds: int) -> dict[str, Any]:
    backends = {
        name: load_backend(bundle, settings=Settings(threads=1, optimized=name != BEFORE))
        for name, bundle in ((BEFORE, mixture), (AFTER, mixture), (DENSE, dense))
    }
    found = {}
    for case, run in CASES.items():
        for backend in backends.values():
            run(backend)
        times = in_turn({name: partial(run, backend) for name, backend in backends.items()}, rounds)
        ratios = {"of dense": over(times[AFTER], times[DENSE]), "of before": over(times[AFTER], times[BEFORE])}
        found[case] = {"milliseconds": medians(times, 3, unit=1e3)} | ratios
        print(f"{case:26} {found[case]['milliseconds']} {ratios}", flush=True)
    return found


def bundles(folder: Path, kind: str) -> tuple[Bundle, Bundle]:
    """Of the mixture, and of the dense model."""
    config = ExportConfig(quantize=None if kind == "none" else kind)
    mixture, dense = (
        optimize(export(folder / name, folder / f"{name}-{kind}", config)) for name in ("mixture", "dense")
    )
    return mixture, dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", nargs="+", choices=("none", "int4", "int8"), default=["none", "int4", "int8"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_experts.json")
    args = parser.parse_args()
    sizes = {"hidden": HIDDEN, "experts": EXPERTS, "per_token": CHOSEN, "width": WIDTH, "layers": args.layers}
    record: dict[str, Any] = {
        "machine": msgspec.to_builtins(read_machine()) | {"processor": processor()},
        **sizes, "rounds": args.rounds, "threads": 1, "weights": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        for which in ("mixture", "dense"):
            write_model(Path(name) / which, args.layers, mixed=which == "mixture")
        for kind in args.quantize:
            made = bundles(Path(name), kind)
            size = made[0].model.with_name("model.onnx.data").stat().st_size
            record["weights"][kind] = {"megabytes": round(size / 1e6), "cases": measure(*made, args.rounds)}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
