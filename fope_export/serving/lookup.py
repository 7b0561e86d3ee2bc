"""What followed the last tokens of a text where they stood before."""

from collections.abc import Sequence

import numpy as np

ORDERS = (12, 6, 3)
"""Tokens that are looked for: as many as were there before say most about what comes."""
USUAL = (0.3, 0.6, 0.8)
"""How often a token is right after so many alike tokens, the fewest first, until it is known."""
DOUBT = 3.0
"""Tokens that it takes to believe what was seen as much as that."""
CALM, WAITING = 32, 8
"""Tokens without one that was expected for each that may wait, and how many may."""
MEMORY = 32.0
"""Tokens that are remembered of what was right."""

BASE, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
"""A key of tokens is a number in this base, of which these digits are kept. (Two texts with one key cost a guess.)"""
POWERS = tuple((order, pow(BASE, order, 1 << 64)) for order in ORDERS)


class Lookup:
    """Follows a text, and expects what followed its end where that stood before. It is told each token once, which
    costs the same however long the text is.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._keys = [0] * len(ORDERS)
        """Of the text's last tokens, as many."""
        self._seen: tuple[dict[int, int], ...] = tuple({} for _ in ORDERS)
        """By the key of as many tokens: the place after the last of them that were so."""
        self._at, self._alike = 0, 0
        """The place of the token that is expected next, 0 for none, and how many before it are those at the end."""
        self._came = 0
        """Where one last came that was expected."""
        self._right = [[DOUBT * chance, DOUBT] for chance in USUAL]
        """By how many are alike: how many tokens were right, and of how many."""

    @property
    def _kind(self) -> int:
        return sum(self._alike >= order for order in ORDERS[:-1])

    @property
    def chance(self) -> float:
        """How often a token that it expects comes, as far as it is known; 0 where it expects none."""
        right, of = self._right[self._kind]
        return right / of if self._at else 0.0

    @property
    def may_wait(self) -> int:
        """Tokens that need not be told yet: the more, the longer nothing that was expected came. Many at once take less
        time than each.
        """
        return 0 if self._at else min((len(self.text) - self._came) // CALM, WAITING)

    def begin(self, tokens: Sequence[int]) -> None:
        """With those of a prompt."""
        self.text, ids = list(tokens), np.array(tokens, np.uint64)
        for i, (order, seen) in enumerate(zip(ORDERS, self._seen, strict=True)):
            ends = range(min(order, len(ids)), len(ids) + 1)
            keys = np.zeros(len(ends), np.uint64)
            for first in range(min(order, len(ids))):
                keys = keys * np.uint64(BASE) + ids[first : first + len(ends)]
            self._keys[i] = int(keys[-1])
            if len(ids) >= order:
                seen.update(zip(keys[:-1].tolist(), ends, strict=False))
        self._at, self._alike = self._find()
        self._came = len(self.text)

    def add(self, token: int) -> None:
        """The text's next, which is compared with what was expected."""
        if self._at:
            came, tally = self.text[self._at] == token, self._right[self._kind]
            tally[0], tally[1] = tally[0] + came, tally[1] + 1
            if tally[1] > MEMORY:
                tally[:] = tally[0] / 2, tally[1] / 2
            if came:
                self._at, self._alike, self._came = self._at + 1, self._alike + 1, len(self.text)
            else:
                self._at = 0
        found = self._write(token)
        if not self._at:
            self._at, self._alike = found

    def _write(self, token: int) -> tuple[int, int]:
        """The next token; what is found then."""
        text, keys = self.text, self._keys
        for i, (order, power) in enumerate(POWERS):
            left = text[-order] * power if len(text) >= order else 0
            keys[i] = (keys[i] * BASE + token - left) & MASK
        text.append(token)
        return self._find()

    def _find(self) -> tuple[int, int]:
        """The place after the last tokens that are the text's end now, and how many these are, zeros for none; from
        now on it is the text's end.
        """
        place, found = len(self.text), (0, 0)
        for order, key, seen in zip(ORDERS, self._keys, self._seen, strict=True):
            if place >= order:
                if not found[0] and (before := seen.get(key)):
                    found = before, order
                seen[key] = place
        return found

    def guess(self, count: int) -> list[int]:
        """The next tokens, as many; none where nothing is alike. After the last goes on what was guessed first."""
        if not self._at:
            return []
        period = len(self.text) - self._at
        return [self.text[self._at + i % period] for i in range(count)]
