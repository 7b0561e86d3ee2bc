"""What a contender is, and the loop that those have in common that have none of their own."""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from fope_export.backends.base import Ids, Logits


class Contender(Protocol):
    """Greedy decoding of B rows of equal length. It keeps its cache; a new prompt begins anew."""

    def begin(self, prompts: Ids, new: int) -> Logits:
        """Logits [B, V] after prompts [B, S]; room for `new` tokens will be enough."""
        ...

    def feed(self, tokens: Ids) -> Logits:
        """Logits [B, V] after one more token in each row [B]."""
        ...

    def first(self, prompts: Ids, new: int) -> Ids:
        """`begin`, and the likeliest token of each row [B]: what is timed."""
        ...

    def next(self) -> Ids:
        """The likeliest after the one given last [B]."""
        ...


class Greedy(ABC):
    """`first` and `next` by `begin` and `feed`."""

    @abstractmethod
    def begin(self, prompts: Ids, new: int) -> Logits:
        """See `Contender`."""

    @abstractmethod
    def feed(self, tokens: Ids) -> Logits:
        """See `Contender`."""

    def first(self, prompts: Ids, new: int) -> Ids:
        """See `Contender`."""
        return self._choose(self.begin(prompts, new))

    def next(self) -> Ids:
        """See `Contender`."""
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
