"""What the slots of an engine hold, and what of it a prompt begins with."""

from collections.abc import Sequence, Set
from itertools import count

from fope_export.backends.base import Slots

SHARED = 16
"""Tokens that a prompt must begin as a slot does for these to be taken from there."""


class Held:
    """The tokens in each slot. What a request leaves stays until another takes its slot."""

    def __init__(self, slots: Slots, chunk: int, *, whole: bool) -> None:
        """With `whole` nothing is taken but what came in whole chunks, of `chunk` tokens."""
        self.tokens: list[list[int]] = [[] for _ in range(slots.count)]
        self._slots, self._chunk, self._cut = slots, chunk, whole
        self._whole = [0] * slots.count
        """How many of them came in whole chunks from the first on."""
        self._left, self._leaving = [0] * slots.count, count(1)
        """When each slot was left: larger is later."""

    def choose(self, prompt: Sequence[int], free: Set[int]) -> int:
        """A slot whose tokens are all the prompt's, else an empty one, else the one that was left first."""

        def worth(slot: int) -> tuple[bool, bool, int, int]:
            held = len(self.tokens[slot])
            return held > 0 and self._alike(prompt, slot) == held, not held, -self._left[slot], -slot

        return max(free, key=worth)

    def _alike(self, prompt: Sequence[int], slot: int) -> int:
        """Tokens in a slot that the prompt begins with, but for its last, and may be taken; few count as none."""
        held = self.tokens[slot]
        longest = min(len(prompt) - 1, len(held))
        same = next((i for i in range(longest) if prompt[i] != held[i]), longest)
        if self._cut:
            same = min(same, self._whole[slot]) // self._chunk * self._chunk
        return same if same >= SHARED else 0

    def begin(self, prompt: Sequence[int], slot: int) -> int:
        """Have a slot hold what it, or another, has of a prompt: how many tokens."""
        alike = [self._alike(prompt, each) for each in range(len(self.tokens))]
        source = alike.index(max(alike))
        if alike[source] > alike[slot]:
            self._slots.copy(source, slot, alike[source])
        self.tokens[slot] = self.tokens[source][: alike[source]]
        self._whole[slot] = min(self._whole[source], alike[source])
        return alike[source]

    def put(self, slot: int, chunk: Sequence[int]) -> None:
        """A slot was fed these."""
        if len(chunk) == self._chunk and self._whole[slot] == len(self.tokens[slot]):
            self._whole[slot] += len(chunk)
        self.tokens[slot].extend(chunk)

    def leave(self, slot: int, *, spoilt: bool) -> None:
        """Nobody has a slot any more, and if it is `spoilt`, nobody knows what it holds."""
        self._left[slot] = next(self._leaving)
        if spoilt:
            self._slots.free(slot)
            self.tokens[slot], self._whole[slot] = [], 0
