#!/usr/bin/env python
"""Tokens per step and speed with guesses, over the same without.

    scripts/bench_speculation.py [--models shipped,60M] [--rounds 7] [--new 400] [--at-once 1,8] [--threads 1] [--quick]

The shipped model writes Python, greedily and drawn. It is too small to be told to copy or to edit, and the paper's 60M
shape has random weights: there the answer is given, by a grammar that allows nothing else, and what is timed is the
model's steps and all that the engine does. Answers are a file of the prompt as it is, the same with a word in fifteen
changed and lines left out and added, and random tokens, where nothing repeats.

Ways take turns within every round; times are of the processor in one thread, without the prompt's, and ratios are
medians of those within a round, with the least and the greatest. A last part counts the answers to 200 random requests
that are others with guesses, in every variant of the shipped model, and lists them: near-ties by the measure of
`validate`'s rule, or where a file rounds activations to 8 bits, by that. Lines of JSON go to
scripts/results/bench_speculation.jsonl.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from guessing import answers, cases, parted
from numpy.typing import NDArray
from serving_bench.bench import ratio
from serving_bench.made import KINDS, Made
from serving_bench.ties import Judge

from fope_export.backends.base import Backend, Ids
from fope_export.backends.choose import BACKENDS, USUAL, Settings, load_backend
from fope_export.bench_report import processor
from fope_export.benchmark.rounds import in_turn
from fope_export.bundle import Bundle
from fope_export.corpus import SEPARATOR, python_source
from fope_export.generation import logits
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.parity.judge import Floats
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Grammar, Request, Token
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.speculation import Speculation
from fope_export.shipped import shipped
from fope_export.tokens import Tokenizer

WAYS = {"off": None, "auto": Speculation(), "7": Speculation(7)}
WORD = re.compile(r"[A-Za-z_]{3,}")


class Given:
    """A grammar that allows one answer."""

    def __init__(self, answer: Sequence[int], vocab_size: int) -> None:
        self._answer, self._size, self._count, self.done = answer, vocab_size, 0, False

    def allowed(self) -> NDArray[np.bool_]:
        one = np.zeros(self._size, np.bool_)
        one[self._answer[self._count]] = True
        return one

    def accept(self, token: int) -> None:  # noqa: ARG002
        self._count += 1
        self.done = self._count == len(self._answer)


class Task(NamedTuple):
    """What one request asks."""

    prompt: Sequence[int]
    answer: Sequence[int] | None = None
    temperature: float = 0.0

    def request(self, new: int, vocab_size: int, seed: int) -> Request:
        given: Grammar | None = Given(self.answer[:new], vocab_size) if self.answer else None
        sampling = SamplingParams(max_new_tokens=new, temperature=self.temperature, seed=seed)
        return Request(prompt=self.prompt, sampling=sampling, grammar=given)


def files(count: int, size: int) -> Iterator[str]:
    """Beginnings of held-out files, of as many characters."""
    texts = (each.decode(errors="replace") for each in python_source(held_out=True).split(SEPARATOR))
    return (text[:size] for text, _ in zip((text for text in texts if len(text) >= size), range(count), strict=False))


def edited(text: str, seed: int) -> str:
    """With one word in fifteen another, and one line in twenty left out or written twice."""
    rng = np.random.default_rng(seed)
    words = WORD.findall(text)
    changed = WORD.sub(lambda word: rng.choice(words) if rng.random() < 1 / 15 else word.group(), text)
    return "".join(line * int(rng.choice([0, 1, 2], p=[0.025, 0.95, 0.025])) for line in changed.splitlines(True))


def tasks(text: Tokenizer, count: int, new: int, vocab_size: int, *, writes: bool) -> dict[str, list[Task]]:
    """By name, as many of each as are asked at once."""
    whole = [*files(count, 3 * new)]
    told = [text.encode(f"{each}\n# The same once more:\n") for each in whole]
    noise = np.random.default_rng(0).integers(2, vocab_size, (count, new))
    given = {
        "copying a file": [Task(told[i], text.encode(whole[i])) for i in range(count)],
        "editing a file": [Task(told[i], text.encode(edited(whole[i], i))) for i in range(count)],
        "nothing repeats": [Task(told[i], noise[i].tolist()) for i in range(count)],
    }
    if not writes:
        return given
    begun = [text.encode(each[:500]) for each in whole]
    written = {
        "writing Python, greedy": [Task(prompt) for prompt in begun],
        "writing Python, temperature 0.6": [Task(prompt, temperature=0.6) for prompt in begun],
    }
    return written | given


class Took(NamedTuple):
    """One round of one way."""

    cpu: float
    wall: float
    per_step: float
    texts: list[list[int]]


def asked(backend: Backend, asked_at_once: Sequence[Task], new: int, speculation: Speculation | None) -> Took:
    """Seconds of the steps after the prompts."""
    room = max(len(task.prompt) for task in asked_at_once) + new
    engine = Engine(backend, len(asked_at_once), room=room, budget=0, speculation=speculation)
    handles = [engine.submit(task.request(new, backend.vocab_size, i)) for i, task in enumerate(asked_at_once)]
    engine.step()
    began = time.thread_time(), time.perf_counter()
    while engine.step():
        pass
    cpu, wall = time.thread_time() - began[0], time.perf_counter() - began[1]
    engine.close()
    texts = [[event.id for event in handle.take() if isinstance(event, Token)] for handle in handles]
    steps, right = sum(handle.steps for handle in handles), sum(handle.right_guesses for handle in handles)
    return Took(cpu, wall, 1 + right / steps, texts)


def measured(backend: Backend, given: Sequence[Task], rounds: int, new: int) -> dict[str, Any]:
    """Of one task."""
    ways: dict[str, Callable[[], Took]] = {name: partial(asked, backend, given, new, way) for name, way in WAYS.items()}
    for way in ways.values():
        way()
    taken = in_turn(ways, rounds)
    plain = taken["off"]
    milliseconds = 1e3 * np.median([each.cpu / max(map(len, each.texts)) for each in plain])
    record: dict[str, Any] = {"ms of a step without": round(float(milliseconds), 3)}
    for name in [*WAYS][1:]:
        record[name] = {
            "tokens per step": round(float(np.median([each.per_step for each in taken[name]])), 2),
            "speed over off": ratio([each.cpu for each in plain], [each.cpu for each in taken[name]]),
            "by the wall's clock": ratio([each.wall for each in plain], [each.wall for each in taken[name]]),
            "texts that differ": sum(
                one != other
                for before, after in zip(plain, taken[name], strict=True)
                for one, other in zip(before.texts, after.texts, strict=True)
            ),
        }
    return record


class Rounding(Judge):
    """For a file that rounds activations to 8 bits, of which `validate` judges a copy that does not: a logit may be off
    by as much as that file's own.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        super().__init__(bundle)
        self._backend = backend

    def allowed(self, truth: Floats, ids: Ids) -> float:
        return float(np.abs(logits(self._backend, ids[0].tolist())[-1] - truth[-1]).max())


def equality(bundle: Bundle, count: int, threads: int) -> Iterator[dict[str, Any]]:
    """Answers with guesses that are others than without, in everything that runs the bundle here."""
    requests = cases(count, bundle.manifest.decoder().vocab_size, new=48)
    for name in (USUAL, "torch"):
        for variant in BACKENDS[name].variants_of(bundle):
            backend = load_backend(bundle, name, Settings(threads=threads), variant=variant.name)
            rounds = variant.optimized and bundle.manifest.export.quantization
            judge = Rounding(bundle, backend) if rounds else Judge(bundle)
            plain, _ = answers(backend, requests, 4, None)
            guessed, counts = answers(backend, requests, 4, Speculation(6))
            found = [*parted(requests, plain, guessed, judge)]
            head = {
                "equality": f"{variant.name} in {name}", "weights": bundle.manifest.export.quantize or "float32",
                "near-ties by": "what the file rounds of activations" if rounds else "what validate allows",
            }  # fmt: skip
            yield head | {
                "requests": count, "tokens": counts.new_tokens, "looks": counts.looks, "guesses": counts.guesses,
                "right guesses": counts.right_guesses, "differences": len(found),
                "that are no near-ties": sum(not each["near-tie"] for each in found), "listed": found,
            }  # fmt: skip


def bundles(made: Made, models: Sequence[str]) -> Iterator[tuple[str, str, Path]]:
    """Each model in each kind."""
    for model in models:
        for kind, config in KINDS.items():
            out = made.folder / f"shipped-{kind}"
            if model == "shipped" and not out.exists():
                optimize(export(shipped("fope"), out, config))
            yield model, kind, out if model == "shipped" else made.bundle("fope", kind)


def lines(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """All that is measured."""
    made = Made(folder)
    for model, kind, path in bundles(made, args.models):
        backend, text = load_backend(path, settings=Settings(threads=args.threads)), Tokenizer(path)
        for at_once in args.at_once:
            given = tasks(text, at_once, args.new, backend.vocab_size, writes=model == "shipped")
            for task, each in given.items():
                head = {"model": model, "weights": kind, "at once": at_once, "task": task}
                yield head | measured(backend, each, args.rounds, args.new)
        backend.close()
    for _, _, path in bundles(made, ["shipped"]):
        yield from equality(Bundle.open(path), args.cases, args.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["shipped", "60M"])
    parser.add_argument("--at-once", type=lambda text: [int(each) for each in text.split(",")], default=[1, 8])
    for name, default in {"rounds": 7, "new": 400, "threads": 1, "cases": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true", help="a trial of the way, whose numbers say nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_speculation.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.models, args.at_once, args.rounds, args.new, args.cases = ["shipped"], [1, 2], 1, 40, 8
    machine = {"processor": processor(), "threads": args.threads, "rounds": args.rounds, "new tokens": args.new}
    with tempfile.TemporaryDirectory() as folder, args.out.open("w") as out:
        for line in lines(args, Path(folder)):
            out.write(json.dumps(machine | {"load": round(os.getloadavg()[0], 1)} | line) + "\n")
            out.flush()
            print(json.dumps(line))


if __name__ == "__main__":
    main()
