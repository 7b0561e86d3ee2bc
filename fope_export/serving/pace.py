"""What an engine's steps take, and whether looking ahead pays by that."""

from collections import deque

WIDTHS = (2, 4, 8, 16)
"""Tokens of a row in a step that looks ahead: one that is drawn already, and guesses."""
GROWTH = 1 / 8
"""Of a single token's step, what each more costs, until one was timed."""
MARGIN = 1.03
"""How much sooner tokens must come for a guess to be worth while."""
PATIENCE = 2.0
"""Steps that may be lost before guessing rests."""
RESTS = (128, 2048)
"""Steps of the first rest, and of the longest: each is twice as long as the one before while all is lost again."""
STALE = 512
"""Looks of a width are forgotten after as many steps without one."""


class Recent:
    """The median of the last few times."""

    def __init__(self) -> None:
        self._taken: deque[float] = deque(maxlen=5)
        self.typical = 0.0

    def add(self, seconds: float) -> None:
        self._taken.append(seconds)
        self.typical = sorted(self._taken)[len(self._taken) // 2]


class Pace:
    """The time of steps with one token in each of some rows, and of looks, which are several tokens in one row."""

    def __init__(self) -> None:
        self._steps: dict[int, Recent] = {}
        self._looks: dict[int, Recent] = {}
        self._looked: dict[int, int] = {}
        """When each width was timed last."""
        self.count = 0

    def step(self, rows: int, seconds: float) -> None:
        """One of so many rows, with nothing in it that a look before has left to do."""
        self._steps.setdefault(rows, Recent()).add(seconds)

    def look(self, width: int, seconds: float) -> None:
        self._looks.setdefault(width, Recent()).add(seconds)
        self._looked[width] = self.count

    def known(self, rows: int) -> float:
        """Seconds of a step; 0 where none was timed."""
        return self._steps[rows].typical if rows in self._steps else 0.0

    def worth(self, rows: int) -> tuple[float, float]:
        """Seconds that a step is shorter by without one of its rows, and that each more token of a row is worth."""
        whole = self.known(rows)
        less = self.known(rows - 1) if rows > 1 else 0.0
        return max(whole - less, 0.0) if less or rows == 1 else 0.0, whole / rows

    def cost(self, width: int) -> float:
        """Seconds of a look of so many tokens, by such looks, or else by others."""
        if width in self._looks and self.count - self._looked[width] < STALE:
            return self._looks[width].typical
        single = self._steps[min(self._steps)].typical
        growths = [
            (look.typical / single - 1) / (each - 1)
            for each, look in self._looks.items()
            if self.count - self._looked[each] < STALE
        ]
        return single * (1 + (width - 1) * max(min(growths, default=GROWTH), 0.0))

    def width(self, chance: float, rows: int, most: int, each: float = 0.0) -> int:
        """Tokens of the look that makes most of its time, when a guess is right with a chance and takes seconds `each`
        to make: at most so many, and 1 where none pays.
        """
        if not self.known(rows):
            return 1
        saved, value = self.worth(rows)
        best, found = MARGIN, 1
        for width in (size for size in WIDTHS if size <= most):
            more = expected(chance, width - 1)
            gain = (saved + more * value) / (self.cost(width) + (width - 1) * each)
            if gain > best:
                best, found = gain, width
        return found


def expected(chance: float, guesses: int) -> float:
    """How many of some guesses in a row are right, when each is with a chance."""
    return float(guesses) if chance == 1 else chance * (1 - chance**guesses) / (1 - chance)


class Trust:
    """Whether guesses of one kind may be made: not for a while after they have cost more than they gave."""

    def __init__(self) -> None:
        self._balance, self._rest, self._next = 0.0, 0, RESTS[0]

    def rests(self) -> bool:
        """Asked once in each step."""
        self._rest = max(self._rest - 1, 0)
        return self._rest > 0

    def settle(self, gained: float, step: float) -> None:
        """Seconds that a look, or what it left to do, has gained over steps that take as many as `step`."""
        self._balance = min(self._balance + gained, PATIENCE * step)
        if self._balance == PATIENCE * step:
            self._next = RESTS[0]
        elif self._balance < -PATIENCE * step:
            self._balance, self._rest = 0.0, self._next
            self._next = min(2 * self._next, RESTS[1])
