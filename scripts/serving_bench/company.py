"""A server in company: a prefix that is there, many clients, and its start."""

import json
import random
import time
from pathlib import Path
from typing import Any

from serving_bench.bench import Bench, Record, answered, body, ratio, share, spread
from serving_bench.made import prompts
from serving_bench.processes import Server, resident

LANES = 64


def prefix(bench: Bench) -> Record:
    """Time to the first token of a prompt that is new, and of the same again."""
    long, rounds = bench.few(2048, 512), bench.few(8, 2)
    options = ("--slots", "2", "--max-model-len", str(long + 64), "--prefix-cache", "512M")
    missed, hit, cached = list[float](), list[float](), list[int]()
    with Server(bench.made.bundle("fope", "float32"), bench.threads, *options) as server:
        for number in range(rounds):
            asked = body(prompts(number, 1, long)[0], 4, model=server.model, stream=True)
            asked |= {"stream_options": {"include_usage": True}}
            for times in (missed, hit):
                (answer,) = answered(bench.clients.load(server, [asked]))
                times.append(answer["times"][0] - answer["began"])
            cached.append(_usage(answer)["prompt_tokens_details"]["cached_tokens"])
    return {
        "prompt": long, "rounds": rounds, "tokens that were there": cached,
        "missed, ms": spread([1e3 * each for each in missed], 1), "hit, ms": spread([1e3 * each for each in hit], 1),
        "hit over missed": ratio(hit, missed),
    }  # fmt: skip


def _usage(answer: Any) -> Record:
    """Of a stream, whose last event but one tells it."""
    event = answer["answer"].strip().split("\n\n")[-2]
    usage: Record = json.loads(event.removeprefix("data: "))["usage"]
    return usage


def clients(bench: Bench) -> Record:
    """Requests of clients that all ask at once, each answer beside its own when it is asked for alone; and the memory
    that the server holds after the first and after all. The shipped model, alike to the last bit in any company.
    """
    count, few = bench.few(1000, 130), bench.few(100, 65)
    options = ("--slots", "8", "--max-queued", str(LANES), "--batch-invariant")
    bundle = bench.made.shipped().path
    with Server(bundle, bench.threads, *options) as server:
        asked = [_asked(server.model, number) for number in range(bench.few(100, 20))]
        alone = [_text(each) for each in answered(bench.clients.load(server, asked))]
        order = [number % len(asked) for number in range(count)]
        random.Random(0).shuffle(order)
        held, answers, began = list[int](), list[Any](), time.monotonic()
        for part in (order[:few], order[few:]):
            answers += bench.clients.load(server, [asked[number] for number in part], LANES)["answers"]
            held.append(resident(server.pid))
        seconds = time.monotonic() - began
    texts = [_text(each) if each["status"] == 200 else None for each in answers]
    times = [each["ended"] - each["began"] for each in answers if "ended" in each]
    wrong = [text for text, number in zip(texts, order, strict=True) if text not in (None, alone[number])]
    return {
        "requests": count, "clients": LANES, "different requests": len(asked), "different answers": len({*alone}),
        "lost": texts.count(None), "another text than alone": len(wrong),
        "another request's text": sum(text in alone for text in wrong),
        "seconds": round(seconds, 1), "p99 of an answer, s": round(share(times, 99), 2),
        f"MiB held after {few}": round(held[0] / 2**20, 1), f"MiB held after {count}": round(held[1] / 2**20, 1),
        "growth": round(held[1] / held[0] - 1, 4),
    }  # fmt: skip


def _asked(model: str, number: int) -> Record:
    """Greedy and drawn, short and longer."""
    drawn = {"temperature": 0.8, "seed": number} if number % 2 else {}
    return body(f"def value_{number}(x, y={number}):\n    return ", 8 + number % 17, model=model) | drawn


def _text(answer: Any) -> str:
    return str(json.loads(answer["answer"])["choices"][0]["text"])


def start(bench: Bench) -> Record:
    """From the command to a first answer of the shipped model; and again after kill -9, with nothing cleaned."""
    bundle: Path = bench.made.shipped().path
    took = list[float]()
    for _ in range(bench.few(5, 2)):
        with Server(bundle, bench.threads) as server:  # leaving ends it with SIGKILL
            asked = body("def main(", 1, model=server.model)
            (answer,) = answered(bench.clients.load(server, [asked]))
            took.append(answer["ended"] - server.began)
    return {
        "seconds from the command to an answer": spread(took, 2),
        "each after kill -9 of the one before": len(took) - 1,
    }
