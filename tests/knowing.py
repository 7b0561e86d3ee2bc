"""Backends that know a text, or make one of tokens and places, to the last bit alike in steps of any length."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fope_export.backends.base import Feeds, Ids, Logits, Slots

Says = Callable[[Sequence[int]], Logits]
"""Logits [V] after tokens."""


class Knowing:
    """A backend whose logits after some tokens are what `says` makes of them all."""

    name, chunk = "knowing", 512

    def __init__(self, vocab_size: int, says: Says) -> None:
        self.vocab_size, self.says = vocab_size, says

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:
        return KnowingSlots(self, count)

    def close(self) -> None:
        """It has nothing."""

    def empty_cache(self, batch: int) -> Any:
        raise NotImplementedError

    def step(self, feeds: Feeds, cache: Any, *, last: bool = False) -> tuple[Logits, Any]:
        raise NotImplementedError


class KnowingSlots:
    """Rows of tokens."""

    capacity: int | None = None

    def __init__(self, backend: Knowing, count: int) -> None:
        self.count, self._backend = count, backend
        self.rows: list[list[int]] = [[] for _ in range(count)]

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        assert start <= len(self.rows[slot])
        self.rows[slot] = row = [*self.rows[slot][:start], *map(int, ids)]
        firsts = range(len(row) - 1 if last else start, len(row))
        return np.stack([self._backend.says(row[: first + 1]) for first in firsts])

    def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
        for slot, token in zip(slots, tokens, strict=True):
            self.rows[slot].append(int(token))
        return np.stack([self._backend.says(self.rows[slot]) for slot in slots])

    def copy(self, source: int, target: int, tokens: int) -> None:
        assert tokens <= len(self.rows[source])
        self.rows[target] = self.rows[source][:tokens]

    def free(self, slot: int) -> None:
        self.rows[slot] = []

    def close(self) -> None:
        """It has nothing."""


def chained(size: int = 24) -> Knowing:
    """Logits by the last two tokens and the place."""
    table = np.random.default_rng(0).standard_normal((5, size, size, size)).astype(np.float32)

    def says(row: Sequence[int]) -> Logits:
        logits: Logits = table[len(row) % 5, row[-2] if len(row) > 1 else 0, row[-1]]
        return logits

    return Knowing(size, says)


def remembering(size: int, follows: Mapping[tuple[int, ...], int], *, wrong: int = 0) -> Knowing:
    """Knows what follows some tokens, and says something else in one of so many cases."""

    def says(row: Sequence[int]) -> Logits:
        logits: Logits = np.zeros(size, np.float32)
        token = follows.get(tuple(row), 0)
        logits[(token + 1) % size if wrong and hash(tuple(row)) % wrong == 0 else token] = 1000
        return logits

    return Knowing(size, says)
