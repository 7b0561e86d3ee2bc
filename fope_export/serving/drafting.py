"""A smaller model that reads an engine's texts along, and goes on ahead of it."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from fope_export.backends.base import CHUNK, Backend, Logits
from fope_export.bundle import Bundle
from fope_export.errors import ConfigError
from fope_export.serving.pace import Recent
from fope_export.serving.sampling import sample
from fope_export.serving.work import Work
from fope_export.tokens import read_object

CHANCE, DOUBT, MEMORY = 0.7, 8.0, 64.0
"""How often a guess is right until it is known, how many guesses it takes to believe otherwise as much, and how many
are remembered.
"""
FEW = 4
"""Tokens that are read in about the time of one."""


class Asked(NamedTuple):
    """Guesses that are wanted."""

    work: Work
    text: Sequence[int]
    """The prompt, and all of the answer."""
    most: int


class Draft:
    """A backend with a slot for each of an engine's, in the engine's thread. It draws with the same noise."""

    def __init__(self, backend: Backend, slots: int, room: int) -> None:
        """Raises BackendError for more slots than it has."""
        self._slots, self._chunk = backend.slots(slots, room), min(backend.chunk, CHUNK)
        self._read: list[list[int]] = [[] for _ in range(slots)]
        """The tokens in each slot, guesses included."""
        self._works: list[Work | None] = [None] * slots
        self._alike, self._right = [0] * slots, [[0.0, 1.0] for _ in range(slots)]
        """How many tokens of each slot are known to be the text's; how many guesses were right, and of how many."""
        self._token = Recent()

    @property
    def seconds(self) -> float:
        """What a guess takes."""
        return self._token.typical

    def chance(self, work: Work) -> float:
        """How often a guess for it is right, as far as it is known."""
        right, of = self._right[work.slot]
        return right / of if self._works[work.slot] is work else CHANCE

    def note(self, work: Work, right: int, of: int) -> None:
        """The first `right` of so many guesses were drawn."""
        tally = self._right[work.slot]
        tally[0], tally[1] = tally[0] + right, tally[1] + min(right + 1, of)
        if tally[1] > MEMORY:
            tally[:] = tally[0] / 2, tally[1] / 2

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What comes next in each of some texts; nothing where there is more to read than a chunk, or no room."""
        made = [self._first(each) for each in asked]
        while going := [number for number, each in enumerate(made) if 0 < len(each) < asked[number].most]:
            started, slots = perf_counter(), [asked[number].work.slot for number in going]
            logits = self._slots.decode(slots, [made[number][-1] for number in going])
            for number, slot, row in zip(going, slots, logits, strict=True):
                self._read[slot].append(made[number][-1])
                made[number].append(_drawn(asked[number].work, row, len(made[number])))
            self._token.add((perf_counter() - started) / len(going))
        return made

    def _first(self, asked: Asked) -> list[int]:
        """The next token of a text, once all of it is read."""
        (work, text, most), slot, capacity = asked, asked.work.slot, self._slots.capacity
        if capacity is not None and len(text) + most > capacity:
            return []
        if self._works[slot] is not work:
            self._works[slot], self._alike[slot], self._right[slot] = work, 0, [CHANCE * DOUBT, DOUBT]
        read, start, started = self._read[slot], self._alike[slot], perf_counter()
        while start < min(len(read), len(text) - 1) and read[start] == text[start]:
            start += 1
        chunk = text[start : start + self._chunk]
        logits = self._slots.prefill(slot, np.array(chunk, np.int64), start)
        read[start:], self._alike[slot] = chunk, start + len(chunk)
        if self._alike[slot] < len(text):
            return []
        guess = _drawn(work, logits[-1], 0)
        if len(chunk) <= FEW:
            self._token.add(perf_counter() - started)
        return [guess]

    def close(self) -> None:
        """Give the slots back."""
        self._slots.close()


def _drawn(work: Work, logits: Logits, ahead: int) -> int:
    """What the engine would draw from logits [V] so many tokens ahead, but for a grammar."""
    draw = work.draw(len(logits))
    return sample(logits[None], [draw._replace(place=draw.place + ahead, allowed=None)])[0]


def require_alike(bundle: Bundle, draft: Bundle) -> None:
    """Raises ConfigError where a draft model's tokens are not those of the model that it is to go ahead of."""
    sizes = [each.manifest.decoder().vocab_size for each in (bundle, draft)]
    if sizes[0] != sizes[1]:
        what = f"vocabularies of {sizes[0]} and {sizes[1]} tokens"
    elif _tokenizer(bundle.path) != _tokenizer(draft.path):
        what = "different tokenizers"
    else:
        return
    raise ConfigError(
        f"{bundle.path} and the draft model {draft.path} have {what}",
        hint="A draft model is trained on the same tokens; leave --draft out for guesses by the text alone.",
    )


def _tokenizer(folder: Path) -> dict[str, Any]:
    """What tokenizer.json says about tokens; nothing where there is none."""
    said = read_object(folder / "tokenizer.json")
    return {name: value for name, value in said.items() if name not in ("padding", "truncation", "version")}
