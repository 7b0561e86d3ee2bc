"""A backend that says what a script says, and writes down what it is asked."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fope_export.backends.base import Feeds, Ids, Logits, Piece, Slots


class Scripted:
    """A prompt that ends in token 1 continues with the script's first line, in 2 with its second; the last token of a
    line is said for ever. A call whose name is `fails` does.
    """

    name, vocab_size, chunk = "scripted", 10, 512

    def __init__(self, script: list[list[int]], *, fails: str = "", capacity: int | None = None) -> None:
        self.script, self.fails, self.capacity, self.log = script, fails, capacity, list[str]()

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:
        return ScriptedSlots(self, count)

    def close(self) -> None:
        """It has nothing."""

    def empty_cache(self, batch: int) -> Any:
        raise NotImplementedError

    def step(self, feeds: Feeds, cache: Any, *, last: bool = False) -> tuple[Logits, Any]:
        raise NotImplementedError


class ScriptedSlots:
    def __init__(self, backend: Scripted, count: int) -> None:
        self.backend, self.count, self.capacity = backend, count, backend.capacity
        self.rows: list[list[int]] = [[] for _ in range(count)]
        self.said = [0] * count

    def _note(self, call: str) -> None:
        self.backend.log.append(call)
        if self.backend.fails and call.startswith(self.backend.fails):
            raise RuntimeError(call)

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        self._note(f"prefill {slot} {ids.tolist()} {start}")
        assert start <= len(self.rows[slot]) and (not self.capacity or start + len(ids) <= self.capacity)
        self.rows[slot], self.said[slot] = [*self.rows[slot][:start], *ids.tolist()], 0
        self.line = {**getattr(self, "line", {}), slot: int(ids[-1]) - 1}
        return self._logits(slot)[None]

    def _logits(self, slot: int) -> Logits:
        line = self.backend.script[self.line[slot] % len(self.backend.script)]
        logits: Logits = np.zeros(self.backend.vocab_size)
        logits[line[min(self.said[slot], len(line) - 1)]] = 1
        self.said[slot] += 1
        return logits

    def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
        fed = dict(zip(slots, tokens, strict=True))
        self._note(f"decode {dict(sorted(fed.items()))}")
        for slot, token in fed.items():
            self.rows[slot].append(token)
        return np.stack([self._logits(slot) for slot in slots])

    def copy(self, source: int, target: int, tokens: int) -> None:
        self._note(f"copy {source} {target} {tokens}")
        self.rows[target] = self.rows[source][:tokens]

    def free(self, slot: int) -> None:
        self._note(f"free {slot}")
        self.rows[slot] = []

    def close(self) -> None:
        self._note("close")


class Companionable(Scripted):
    """One that takes prompts together."""

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:
        return CompanionableSlots(self, count)


class CompanionableSlots(ScriptedSlots):
    def prefill_together(self, pieces: Sequence[Piece]) -> Logits:
        self._note(f"together {[piece.slot for piece in pieces]}")
        return np.concatenate([self.prefill(*piece) for piece in pieces])
