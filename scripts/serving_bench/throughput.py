"""Tokens a second, and the processor time that a token takes, through HTTP, inside, and of others."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fope_export.benchmark.rounds import in_turn
from serving_bench.bench import Bench, Record, answered, body, ratio, spread
from serving_bench.made import KINDS, prompts
from serving_bench.processes import HERE, Inside, Program, Server, cpu_of

PEERS = HERE.parent.parent / ".venv-serving" / "bin" / "python"
OURS, INVARIANT = "inside", "inside, --batch-invariant"
WHOLE, STREAMED = "HTTP, whole answers", "HTTP, streams"
LLAMA, OPENVINO = "llama.cpp's server, RoPE twin", "OpenVINO GenAI's continuous batching, RoPE twin"
SLOTS, LENGTH = 16, 512
CHECKED, AGREEING = 8, 6
"""Prompts whose first tokens a peer must give as our engine does on the twin, and how many at least: weights are
random, and some likeliest tokens hardly lead.
"""
Prompts = Sequence[list[int]]


class Taken(NamedTuple):
    """What a load took."""

    seconds: float
    cpu: float
    """Seconds of processor time, of the server alone."""
    client: float = 0.0


Load = Callable[[Prompts, int], Taken]


def throughput(bench: Bench) -> Record:
    """In every round everybody in turn, with the same prompts; who computes has `threads` for an operator, and clients
    have a process of their own.
    """
    return {kind: _of_kind(bench, kind) for kind in KINDS}


def _of_kind(bench: Bench, kind: str) -> Record:
    counts, rounds, new = (1, 2, 4, 8, 16)[: bench.few(5, 2)], bench.few(4, 1), bench.few(32, 8)
    with ExitStack() as stack:
        loads, without = _loads(bench, kind, stack)
        requests = {count: _of_count(bench, loads, count, rounds, new) for count in counts}
    return {"rounds": rounds, "new tokens": new, "requests at once": requests, "not measured": without}


def _of_count(bench: Bench, loads: dict[str, Load], count: int, rounds: int, new: int) -> Record:
    """Prompts are new in every round; a first round warms up."""
    given = [prompts(1000 * count + number, count, bench.few(64, 16)) for number in range(rounds + 1)]
    for load in loads.values():
        load(given[rounds], new)
    asked = {name: _in_rounds(load, given, new) for name, load in loads.items()}
    taken = in_turn(asked, rounds, pause=0.05)
    tokens, ours = count * new, taken[OURS]
    return {
        name: {
            "tokens a second": spread([tokens / each.seconds for each in rounds_of], 1),
            "ours inside over it, in speed": ratio(_seconds(rounds_of), _seconds(ours)),
            "ours through HTTP over it, in speed": ratio(_seconds(rounds_of), _seconds(taken[WHOLE])),
            "CPU of a token, ms": spread([1e3 * each.cpu / tokens for each in rounds_of], 2),
            "CPU over ours inside": ratio([each.cpu for each in rounds_of], [each.cpu for each in ours]),
            "clients' CPU of a token, ms": spread([1e3 * each.client / tokens for each in rounds_of], 2),
        }
        for name, rounds_of in taken.items()
    }


def _seconds(rounds: Sequence[Taken]) -> list[float]:
    return [each.seconds for each in rounds]


def _in_rounds(load: Load, given: Sequence[Prompts], new: int) -> Callable[[], Taken]:
    """The same load with other prompts at each call."""
    batches = iter(given)
    return lambda: load(next(batches), new)


def _loads(bench: Bench, kind: str, stack: ExitStack) -> tuple[dict[str, Load], dict[str, str]]:
    """By name; and why others cannot be had."""
    bundle = bench.made.bundle("fope", kind)
    inside = stack.enter_context(Inside(bundle, bench.threads, SLOTS, LENGTH))
    alike = stack.enter_context(Inside(bundle, bench.threads, SLOTS, LENGTH, invariant=True))
    sizes = ("--slots", str(SLOTS), "--max-model-len", str(LENGTH))
    server = stack.enter_context(Server(bundle, bench.threads, *sizes))
    named = {"model": server.model}
    loads: dict[str, Load] = {
        OURS: lambda given, new: _inside(inside, given, new),
        INVARIANT: lambda given, new: _inside(alike, given, new),
        WHOLE: lambda given, new: _http(bench, server, given, new, named),
        STREAMED: lambda given, new: _http(bench, server, given, new, named | {"stream": True}),
    }
    without = dict[str, str]()
    for name, make in {LLAMA: _llama, OPENVINO: _openvino}.items():
        try:
            loads[name] = make(bench, kind, stack)
        except (RuntimeError, OSError) as cause:
            without[name] = f"{cause}; is there what `scripts/venv serving` installs?"
    return loads, without


def _inside(program: Program, given: Prompts, new: int) -> Taken:
    took = program.ask(do="answers", prompts=given, new=new)
    return Taken(took["seconds"], took["cpu"])


def _http(bench: Bench, server: Program, given: Prompts, new: int, fields: Record) -> Taken:
    before = cpu_of(server.pid)
    load = bench.clients.load(server, [body(prompt, new, **fields) for prompt in given], len(given))
    took = cpu_of(server.pid) - before
    for each in answered(load):
        if "stream" not in fields and (made := json.loads(each["answer"])["usage"]["completion_tokens"]) != new:
            raise RuntimeError(f"an answer has {made} tokens, and {new} were asked for")
    return Taken(load["seconds"], took, load["cpu"])


def _llama(bench: Bench, kind: str, stack: ExitStack) -> Load:
    file, sizes = _written(bench, "llama", kind), map(str, (bench.threads, SLOTS, LENGTH))
    server = stack.enter_context(_peer("llama", file, *sizes, threads=bench.threads))
    server.port = server.told()["port"]
    if kind == "float32":
        fields = {"n_predict": 1, "temperature": 0, "return_tokens": True}
        asked = [fields | {"prompt": prompt} for prompt in prompts(0, CHECKED, 32)]
        told = answered(bench.clients.load(server, asked, path="/completion"))
        _check(bench, [json.loads(each["answer"])["tokens"][:1] for each in told])
    return lambda given, new: _http(bench, server, given, new, {"cache_prompt": False})


def _openvino(bench: Bench, kind: str, stack: ExitStack) -> Load:
    folder = _written(bench, "openvino", kind)
    running = stack.enter_context(_peer("openvino", folder, str(bench.threads), str(SLOTS), threads=bench.threads))
    running.told()
    if kind == "float32":
        _check(bench, running.ask(prompts=prompts(0, CHECKED, 32), new=1)["answers"])
    return lambda given, new: _inside(running, given, new)


def _written(bench: Bench, peer: str, kind: str) -> Path:
    """The twin as a peer reads it."""
    out = bench.made.folder / f"{peer}-{kind}"
    checkpoint, bundle = bench.made.checkpoint("rope"), bench.made.bundle("rope", kind)
    with _peer("write", peer, checkpoint, bundle, kind, out, threads=bench.threads) as writer:
        writer.told()
    return out


def _peer(*what: str | Path, threads: int) -> Program:
    return Program(HERE / "peers.py", *what, threads=threads, python=PEERS)


def _check(bench: Bench, firsts: Sequence[list[int]]) -> None:
    """Raises RuntimeError where a peer computes another model."""
    with Inside(bench.made.bundle("rope", "float32"), bench.threads, CHECKED, LENGTH) as twin:
        ours = twin.ask(do="answers", prompts=prompts(0, CHECKED, 32), new=1)["answers"]
    if (alike := sum(a == b for a, b in zip(firsts, ours, strict=True))) < AGREEING:
        raise RuntimeError(f"{alike} of {CHECKED} first tokens are the twin's")
