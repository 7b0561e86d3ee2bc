"""Requests that a guess can be right or wrong about, and where their answers with guesses are others than without."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from serving_bench.ties import Difference, Judge, differences

from fope_export.backends.base import Backend
from fope_export.serving.engine import Counts, Engine
from fope_export.serving.requests import Finished, Request, Token
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.speculation import Speculation

Answer = tuple[list[int], str]
"""Tokens, and why there are no more."""


def cases(count: int, vocab_size: int, *, new: int, seed: int = 0) -> list[Request]:
    """Half of them greedy, half drawn from few tokens; what their prompts end with stands in them before."""
    return [_case(np.random.default_rng((seed, number)), number, vocab_size, new) for number in range(count)]


def _case(rng: np.random.Generator, number: int, vocab_size: int, new: int) -> Request:
    said = rng.integers(0, vocab_size, rng.integers(4, 24))
    prompt = [*said, *rng.integers(0, vocab_size, rng.integers(1, 9)), *said[: rng.integers(3, len(said))]]
    options: dict[str, Any] = {"max_new_tokens": int(rng.integers(2, new + 1)), "seed": number}
    if number % 2:
        options |= {"temperature": float(rng.choice([0.3, 0.7, 1.0])), "top_k": int(rng.integers(2, 5))}
    if number % 3 == 0:
        options |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    if number % 5 == 0:
        options |= {"logit_bias": {int(token): 4.0 for token in said[:4]}}
    ends = frozenset(rng.integers(0, vocab_size, vocab_size // 16).tolist() if number % 4 == 0 else ())
    options |= {"min_new_tokens": int(rng.integers(0, new // 2))} if ends else {}
    return Request(
        prompt=[int(token) for token in prompt], sampling=SamplingParams(**options), ends=ends,
        choice=int(rng.integers(0, 3)), logprobs=2 if number % 7 == 0 else None,
    )  # fmt: skip


def answers(
    backend: Backend, asked: Sequence[Request], at_once: int, speculation: Speculation | None,
    made: type[Engine] = Engine,
) -> tuple[list[Answer], Counts]:  # fmt: skip
    """Of so many at a time, and what the engine has done for them."""
    engine = made(backend, at_once, speculation=speculation)
    handles = [engine.submit(request) for request in asked]
    while engine.step():
        pass
    engine.close()
    told = [handle.take() for handle in handles]
    ends = [events[-1].reason if isinstance(events[-1], Finished) else repr(events[-1]) for events in told]
    tokens = [[event.id for event in events if isinstance(event, Token)] for events in told]
    return list(zip(tokens, ends, strict=True)), engine.counts


def parted(
    asked: Sequence[Request], plain: Sequence[Answer], guessed: Sequence[Answer], judge: Judge
) -> Iterator[dict[str, Any]]:
    """Where answers are not the same, each with whether that is a near-tie."""
    texts = [[tokens for tokens, _ in each] for each in (plain, guessed)]
    for each in differences(*texts):
        yield each._asdict() | {"near-tie": judge.near(asked, texts[0], each)}
    for number, ((one, why), (other, reason)) in enumerate(zip(plain, guessed, strict=True)):
        if one[: len(other)] == other[: len(one)] and (len(one), why) != (len(other), reason):
            yield Difference(number, min(len(one), len(other)), -1, -1)._asdict() | {"near-tie": False}
