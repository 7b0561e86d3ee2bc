"""Where an answer in company is another than alone: near-ties, by the measure of the rule of `validate`."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_export.backends.base import Backend, Ids, feeds_for
from fope_export.backends.choose import Settings, load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.model.checkpoint import source_of
from fope_export.parity.judge import MEMBERS, MORE, Floats, Noise
from fope_export.parity.yardstick import moved
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Request, Token
from fope_export.serving.sampling import Draw, SamplingParams, sample
from serving_bench.bench import Bench, Record

SHOWN = 200
"""Differences that are listed, at most."""


class Difference(NamedTuple):
    """Two answers to one request part here, with these tokens."""

    request: int
    place: int
    """Tokens of the answers that are alike."""
    alone: int
    beside: int


def ties(bench: Bench) -> Record:
    """The same prompts and seeds alone and in company, half greedy and half drawn, without --batch-invariant: tokens
    are compared up to the first that differs.
    """
    bundle = bench.made.shipped()
    asked = requests_of(bench.few(160, 8), bench.few(96, 24))
    backend = load_backend(bundle, settings=Settings(threads=bench.threads))
    alone, beside = answers(backend, asked, 1), answers(backend, asked, 8)
    found, judge = differences(alone, beside), Judge(bundle)
    listed = [
        each._asdict() | {"drawn": each.request % 2 == 1, "near-tie": judge.near(asked, alone, each)} for each in found
    ]
    return {
        "requests": len(asked), "tokens": sum(map(len, alone)), "tokens that were compared": compared(alone, found),
        "differences": len(found), "that are no near-ties": sum(not each["near-tie"] for each in listed),
        "listed": listed[:SHOWN],
    }  # fmt: skip


def requests_of(count: int, new: int) -> list[Request]:
    """Prompts of text with a sampling of their own each."""
    texts = [f"def method_{i}(self, value={i * i}):\n    " for i in range(count)]
    return [
        Request(prompt=[*text.encode()], sampling=SamplingParams(max_new_tokens=new, temperature=0.8 * (i % 2), seed=i))
        for i, text in enumerate(texts)
    ]


def answers(backend: Backend, asked: Sequence[Request], at_once: int) -> list[list[int]]:
    """Of so many at a time."""
    engine = Engine(backend, at_once)
    handles = [engine.submit(request) for request in asked]
    while engine.step():
        pass
    engine.close()
    return [[event.id for event in handle.take() if isinstance(event, Token)] for handle in handles]


def differences(alone: Sequence[list[int]], beside: Sequence[list[int]]) -> list[Difference]:
    """The first of each pair of answers that has one."""
    found = []
    for number, (one, other) in enumerate(zip(alone, beside, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if place is not None:
            found.append(Difference(number, place, one[place], other[place]))
    return found


def compared(alone: Sequence[list[int]], found: Sequence[Difference]) -> int:
    """Tokens, up to the first that differs in each answer."""
    places = {each.request: each.place + 1 for each in found}
    return sum(places.get(number, len(one)) for number, one in enumerate(alone))


class Judge:
    """Knows what rounding may do to a logit: float64, and copies of PyTorch whose weights are moved by a last place."""

    def __init__(self, bundle: Bundle) -> None:
        self._model = source_of(bundle).model.converted(bundle.manifest.export)
        self._exact = EagerBackend.in_float64(self._model)
        self._members = [EagerBackend(moved(self._model, number)) for number in range(MEMBERS + MORE)]

    def near(self, asked: Sequence[Request], alone: Sequence[list[int]], found: Difference) -> bool:
        """Whether logits that are off by no more than the rule allows can give either token."""
        request = asked[found.request]
        ids = np.array([[*request.prompt, *alone[found.request][: found.place]]], np.int64)
        truth = _logits(self._exact, ids)
        allowed = self.allowed(truth, ids)
        draw = _draw(request, alone[found.request][: found.place], truth.shape[1])
        return all(can_be(token, truth[-1], allowed, draw) for token in (found.alone, found.beside))

    def allowed(self, truth: Floats, ids: Ids) -> float:
        """How far the last logit of some tokens [1, S] may be from the truth [S, V]."""
        noise = Noise.of(truth, [_logits(each, ids) for each in self._members], float(np.finfo(np.float32).eps))
        return float(noise.tied()[-1])


def _draw(request: Request, made: Sequence[int], size: int) -> Draw:
    """What the token after those that were `made` depends on."""
    early = len(made) < request.sampling.min_new_tokens and request.ends
    allowed = ~np.isin(np.arange(size), list(request.ends)) if early else None
    place = len(request.prompt) + len(made)
    return Draw(request.sampling, place, request.choice, request.prompt, Counter(made), allowed)


def _logits(backend: EagerBackend, ids: Ids) -> Floats:
    """[S, V]"""
    logits: Any = backend.step(feeds_for(ids), backend.empty_cache(1))[0][0]
    return np.asarray(logits)


def can_be(token: int, logits: Floats, allowed: float, draw: Draw) -> bool:
    """Whether it is drawn where its logit is as much too high as may be, and all others too low."""
    raised = logits - allowed
    raised[token] += 2 * allowed
    return sample(raised[None], [draw]) == [token]
