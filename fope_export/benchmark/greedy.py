"""What a contender is, and the loop that those have in common that have none of their own."""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from fope_export.backends.base import Ids, Logits


class Contender(Protocol):
    """Greedy decoding of B rows of equal length, to be timed. It keeps its own cache between calls, for one batch of
    prompts at a time. What fails, fails with an exception of the library that runs it.
    """

    def begin(self, prompts: Ids, new: int) -> Logits:
        """Forget what was there, and read prompts [B, S]; make room for `new` tokens more in each row. Logits [B, V] of
        the token to come.
        """
        ...

    def feed(self, tokens: Ids) -> Logits:
        """Read one more token in each row [B]. Logits [B, V] of the token to come."""
        ...

    def first(self, prompts: Ids, new: int) -> Ids:
        """`begin`, and the likeliest token of each row [B]. This call is timed as the time to the first token."""
        ...

    def next(self) -> Ids:
        """`feed` the tokens that `first` or `next` gave last, and the likeliest ones after them [B]. This call is timed
        as the time of a token.
        """
        ...


class Greedy(ABC):
    """`first` and `next` of a contender that has `begin` and `feed`."""

    @abstractmethod
    def begin(self, prompts: Ids, new: int) -> Logits:
        """Read prompts [B, S], with room for `new` tokens more; logits [B, V]."""

    @abstractmethod
    def feed(self, tokens: Ids) -> Logits:
        """Read one more token in each row [B]; logits [B, V]."""

    def first(self, prompts: Ids, new: int) -> Ids:
        return self._choose(self.begin(prompts, new))

    def next(self) -> Ids:
        return self._choose(self.feed(self._tokens))

    def _choose(self, logits: Logits) -> Ids:
        tokens: Ids = logits.argmax(-1)
        self._tokens = tokens
        return tokens


def answer(contender: Contender, prompts: Ids, new: int) -> Ids:
    """Greedy tokens [B, new]."""
    tokens = [contender.first(prompts, new)]
    tokens += [contender.next() for _ in range(new - 1)]
    return np.stack(tokens, axis=1)


def scores(contender: Contender, prompts: Ids, answers: Ids) -> Logits:
    """Logits [B, N, V] that a contender gives for each of the tokens of answers [B, N], whoever chose them."""
    steps = [contender.begin(prompts, answers.shape[1])]
    steps += [contender.feed(tokens) for tokens in answers.T[:-1]]
    return np.stack(steps, axis=1)


def distance(reference: Logits, got: Logits, answers: Ids) -> float:
    """How far a contender is from the reference that scored its answers: the larger of its logits' error, relative in
    the root mean square, and of how far its tokens are behind the likeliest, on average and as a share of the largest.
    """
    error = np.linalg.norm(got.astype(np.float64) - reference) / np.linalg.norm(reference)
    chosen = np.take_along_axis(reference, answers[..., None], axis=-1)[..., 0]
    behind = ((reference.max(-1) - chosen) / np.abs(reference).max(-1)).mean()
    return float(max(error, behind))
