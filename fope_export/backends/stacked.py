"""Slots for a backend whose steps take one cache for all rows: rows that are decoded together lie in one cache, padded
on the left.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fope_export.backends.base import Backend, Ids, Logits, feeds_for
from fope_export.errors import BackendError


class Part(NamedTuple):
    """Tokens of one row of a cache: those that columns `start` to `end` of its attention mask stand for."""

    cache: Any
    row: int
    start: int
    end: int
    alone: bool = False
    """Whether the cache has no other row, and no other column."""

    @property
    def length(self) -> int:
        return self.end - self.start


class Stackable(Backend, Protocol):
    """A backend that can make a cache out of rows of other caches, so that `StackedSlots` serves requests with it."""

    def assemble(self, parts: Sequence[Part]) -> Any:
        """A new cache with a row for each of `parts`, in their order, padded on the left to the longest. The
        caches that they are parts of stay as they are.
        """
        ...


class StackedSlots:
    """Rows that were decoded together stay so: one that leaves is fed on, unread, until another comes."""

    def __init__(self, backend: Stackable, count: int, capacity: int | None = None, *, whole: bool = False) -> None:
        if whole:
            raise BackendError(
                f"{backend.name} runs the rows that a step names, and no others",
                hint="A file of `fope-export optimize` in ONNX Runtime can run all.",
            )
        self.count, self.capacity, self._backend = count, capacity, backend
        self._parts: list[Part | None] = [None] * count
        self._cache: Any = None
        """Of the rows that were decoded last, each as long as its mask is wide."""
        self._rows, self._total = 0, 0

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        total, part = start + len(ids), self._parts[slot]
        if start == 0 or part is None:
            cache = self._backend.empty_cache(1)
        else:
            cache = part.cache if part.alone and part.length == start else self._first(part, start)
        mask = np.ones((1, total), np.int64)
        logits, cache = self._backend.step(feeds_for(ids[None], mask), cache, last=last)
        self._parts[slot] = Part(cache, 0, 0, total, alone=True)
        return logits.reshape(-1, self._backend.vocab_size)

    def _first(self, part: Part, tokens: int) -> Any:
        """A cache of these of its tokens alone."""
        return self._backend.assemble([part._replace(end=part.start + tokens)])

    def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
        parts = self._together(slots)
        rows, total = [part.row for part in parts], self._total + 1
        ids, starts = np.zeros((self._rows, 1), np.int64), np.zeros((self._rows, 1), np.int64)
        ids[rows, 0], starts[rows, 0] = tokens, [part.start for part in parts]
        mask = (np.arange(total) >= starts).astype(np.int64)
        old, (logits, self._cache) = self._cache, self._backend.step(feeds_for(ids, mask), self._cache, last=True)
        self._total = total
        for slot, part in enumerate(self._parts):
            if part and part.cache is old:
                end = total if slot in slots else part.end
                self._parts[slot] = part._replace(cache=self._cache, end=end, alone=self._rows == 1)
        return logits[rows, -1]

    def _together(self, slots: Sequence[int]) -> list[Part]:
        """Their parts, in one cache that has few rows beside them."""
        parts = [part for slot in slots if (part := self._parts[slot])]
        fits = self._rows <= 2 * len(parts) and self._total != self.capacity
        if fits and all(part.cache is self._cache and part.end == self._total for part in parts):
            return parts
        self._part_with(slots)
        self._rows, self._total = len(parts), widest(parts)
        self._cache = parts[0].cache if parts[0].alone and len(parts) == 1 else self._backend.assemble(parts)
        together = [
            Part(self._cache, row, self._total - part.length, self._total, alone=len(parts) == 1)
            for row, part in enumerate(parts)
        ]
        for slot, part in zip(slots, together, strict=True):
            self._parts[slot] = part
        return together

    def _part_with(self, leaving: Sequence[int]) -> None:
        """Give a cache of its own to each row that stays behind when these leave the one of all."""
        for slot, part in enumerate(self._parts):
            if part and slot not in leaving and part.cache is self._cache and not part.alone:
                self._parts[slot] = Part(self._first(part, part.length), 0, 0, part.length, alone=True)

    def copy(self, source: int, target: int, tokens: int) -> None:
        part = self._parts[source]
        assert part is not None
        self._parts[target] = Part(self._first(part, tokens), 0, 0, tokens, alone=True)

    def free(self, slot: int) -> None:
        self._parts[slot] = None
        if not any(part and part.cache is self._cache for part in self._parts):
            self._cache, self._rows, self._total = None, 0, 0

    def close(self) -> None:
        for slot in range(self.count):
            self.free(slot)


def fill(array: Any, sources: Sequence[Any], parts: Sequence[Part], width: int) -> Any:
    """Write a cache's `parts` into the zeros of `array` [B, K, C, E], the rows of `sources` that they name ending at
    slot `width`; numpy or torch.
    """
    for row, (source, part) in enumerate(zip(sources, parts, strict=True)):
        array[row, :, width - part.length : width] = source[part.row, :, part.start : part.end]
    return array


def widest(parts: Sequence[Part]) -> int:
    """Tokens of the longest."""
    return max(part.length for part in parts)
