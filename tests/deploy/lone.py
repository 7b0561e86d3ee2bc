"""What an engine that nobody else uses answers, and whether another answer differs by a near-tie."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend
from fope_export.bundle import Bundle
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Logprobs, Request, Token
from fope_export.serving.sampling import Draw, SamplingParams, _waits
from fope_export.tokens import Tokenizer


class Lone:
    """Answers requests as servers are asked, one after another."""

    def __init__(self, bundle: Bundle, backend: Backend, engine: Engine) -> None:
        self.text, self._backend, self._engine = Tokenizer(bundle.path), backend, engine
        self._known: dict[str, list[int]] = {}

    def answer(self, body: dict[str, Any], logprobs: int | None = None) -> list[Token]:
        """An answer that ends with its length."""
        handle = self._engine.submit(
            Request(prompt=self.text.encode(body["prompt"]), sampling=_sampling(body), logprobs=logprobs)
        )
        while self._engine.step():
            pass
        return [event for event in handle.take() if isinstance(event, Token)]

    def tokens(self, body: dict[str, Any]) -> list[int]:
        if (asked := str(body)) not in self._known:
            self._known[asked] = [token.id for token in self.answer(body)]
        return self._known[asked]

    def logprobs(self, body: dict[str, Any], top: int) -> list[Logprobs]:
        return [token.logprobs for token in self.answer(body, top) if token.logprobs]

    def says(self, body: dict[str, Any]) -> str:
        return self.text.decode(self.tokens(body))

    def ties(self, bodies: Sequence[dict[str, Any]], told: Sequence[str]) -> list[str]:
        """Of each answer that differs, where it does. Raises AssertionError where that is no near-tie."""
        found = []
        for body, text in zip(bodies, told, strict=True):
            ours, theirs = self.tokens(body), self.text.encode(text)
            if self.text.decode(ours) == text:
                continue
            place = next(i for i in range(len(ours)) if ours[i : i + 1] != theirs[i : i + 1])
            assert place < len(theirs), f"{body} was told {text!r} only"
            lead, noise = self._lead(body, ours, place, theirs[place])
            assert lead <= 2 * noise, f"{body}: another token at {place}, {lead} behind, and rounding is {noise}"
            found.append(f"{body['prompt']!r}: token {place}, {lead:.1e} behind")
        return found

    def _lead(self, body: dict[str, Any], ours: Sequence[int], place: int, other: int) -> tuple[float, float]:
        """How far our token leads another, and how far two ways to compute the logits there differ: after a prompt,
        and after as many single tokens.
        """
        prompt = self.text.encode(body["prompt"])
        ids = np.array([*prompt, *ours[:place]], np.int64)
        with closing(self._backend.slots(8, len(ids) + 1, whole=True)) as slots:
            fed = slots.prefill(0, ids, 0)[-1]
            stepped = slots.prefill(1, ids[:1], 0)[-1]
            for token in ids[1:]:
                stepped = slots.decode([1], [token])[0]
        sampling = _sampling(body)
        scores = _scores(stepped, Draw(sampling, len(ids)))
        return float(scores[ours[place]] - scores[other]), float(abs(fed - stepped).max()) / (sampling.temperature or 1)


def _sampling(body: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_new_tokens=body["max_tokens"], temperature=body["temperature"], seed=body.get("seed", 0))


def _scores(logits: NDArray[Any], draw: Draw) -> NDArray[np.float64]:
    """What the drawn token has most of."""
    if not draw.sampling.temperature:
        return logits.astype(np.float64)
    waits = _waits(draw, len(logits), np.arange(len(logits)))
    drawn: NDArray[np.float64] = logits.astype(np.float64) / draw.sampling.temperature - np.log(waits)
    return drawn
