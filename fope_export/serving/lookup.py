"""What followed the last tokens of a text where they stood before."""

from collections.abc import Iterable

ORDERS = (12, 6, 3)
"""Tokens that are looked for: as many as were there before say most about what comes."""
USUAL = (0.3, 0.6, 0.85)
"""How often a token is right after so many alike tokens, the fewest first, until it is known."""
DOUBT = 4.0
"""Tokens that it takes to believe what was seen as much as that."""
MEMORY = 32.0
"""Tokens that are remembered of what was right."""


class Lookup:
    """Follows a text, and expects what followed its end where that stood before. It is told each token once, which
    costs the same however long the text is.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._seen: tuple[dict[int, int], ...] = tuple({} for _ in ORDERS)
        """By the hash of as many tokens: the place after the last of them that were so."""
        self._at, self._alike = 0, 0
        """The place of the token that is expected next, 0 for none, and how many before it are those at the end."""
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

    def begin(self, tokens: Iterable[int]) -> None:
        """With those of a prompt."""
        for token in tokens:
            self._at, self._alike = self._write(token)

    def add(self, token: int) -> None:
        """The text's next, which is compared with what was expected."""
        if self._at:
            came, tally = self.text[self._at] == token, self._right[self._kind]
            tally[0], tally[1] = tally[0] + came, tally[1] + 1
            if tally[1] > MEMORY:
                tally[:] = tally[0] / 2, tally[1] / 2
            self._at, self._alike = (self._at + 1, self._alike + 1) if came else (0, 0)
        found = self._write(token)
        if not self._at:
            self._at, self._alike = found

    def _write(self, token: int) -> tuple[int, int]:
        """The place after the last tokens that are the text's end now, and how many these are; zeros for none."""
        text, found = self.text, (0, 0)
        text.append(token)
        for order, seen in zip(ORDERS, self._seen, strict=True):
            if len(text) >= order:
                key = hash(tuple(text[-order:]))
                if not found[0] and (place := seen.get(key)):
                    found = place, order
                seen[key] = len(text)
        return found

    def guess(self, count: int) -> list[int]:
        """The next tokens, as many; none where nothing is alike. After the last goes on what was guessed first."""
        if not self._at:
            return []
        period = len(self.text) - self._at
        return [self.text[self._at + i % period] for i in range(count)]
