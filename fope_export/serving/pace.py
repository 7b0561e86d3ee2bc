"""What an engine's steps take, and whether looking ahead pays by that."""

from collections import deque

WIDTHS = (2, 4, 8, 16)
"""Tokens of a row in a step that looks ahead: one that is drawn already, and guesses."""
GROWTH = 1 / 8
"""Of a single token's step, what each more costs, until one was timed."""
SURE, DOUBTED = 3, 2.0
"""How often something is timed before it is believed, and how many times what was expected is believed until then."""
MARGIN = 1.1
"""How much sooner tokens must come for a guess to be worth while."""
PATIENCE = 5.0
"""Steps that may be lost before guessing rests."""
RESTS = (192, 3072)
"""Steps of the first rest, and of the longest: each is twice as long as the one before while all is lost again."""
LEAST = 0.01
"""How often guesses are wrong at least, for a bound of what they can give."""
SEEN = 64
"""Steps after which costs are looked at again."""
STALE = 512
"""Looks of a width are forgotten after as many steps without one."""


class Recent:
    """The median of the last few times, of two the shorter: now and then something else takes the processor."""

    def __init__(self) -> None:
        self._taken: deque[float] = deque(maxlen=5)
        self.typical = 0.0

    def add(self, seconds: float) -> None:
        self._taken.append(seconds)
        self.typical = sorted(self._taken)[(len(self._taken) - 1) // 2]

    @property
    def sure(self) -> bool:
        """Whether one that took too long cannot matter."""
        return len(self._taken) >= SURE


class Pace:
    """The time of steps with one token in each of some rows, and of looks, which are several tokens in one row."""

    def __init__(self) -> None:
        self._steps: dict[int, Recent] = {}
        self._looks: dict[int, Recent] = {}
        self._looked: dict[int, int] = {}
        """When each width was timed last."""
        self.count = 0
        self._costs: list[tuple[int, float]] = []
        """Of looks of those of WIDTHS that are no more than twice what is known, as they were seen last."""

    def step(self, rows: int, seconds: float) -> None:
        """One of so many rows, with nothing in it that a look before has left to do."""
        self._steps.setdefault(rows, Recent()).add(seconds)

    def look(self, width: int, seconds: float) -> None:
        self._looks.setdefault(width, Recent()).add(seconds)
        self._looked[width] = self.count
        self._costs.clear()

    def known(self, rows: int) -> float:
        """Seconds of a step; 0 where too few were timed."""
        steps = self._steps.get(rows)
        return steps.typical if steps and steps.sure else 0.0

    def worth(self, rows: int) -> tuple[float, float]:
        """Seconds that a step is shorter by without one of its rows, and that each more token of a row is worth."""
        whole = self.known(rows)
        less = self.known(rows - 1) if rows > 1 else 0.0
        return max(whole - less, 0.0) if less or rows == 1 else 0.0, whole / rows

    def cost(self, width: int) -> float:
        """Seconds of a look of so many tokens, by such looks, or else by others."""
        single = min(step.typical / rows for rows, step in self._steps.items())  # no more than that, or a row's own
        fresh = {each: look for each, look in self._looks.items() if self.count - self._looked[each] < STALE}
        if own := fresh.get(width):
            doubted = DOUBTED * single * (1 + (width - 1) * GROWTH)
            return own.typical if own.sure else min(own.typical, doubted)
        growths = [(look.typical / single - 1) / (each - 1) for each, look in fresh.items() if look.sure]
        return single * (1 + (width - 1) * max(min(growths, default=GROWTH), 0.0))

    def width(self, chance: float, rows: int, most: int, each: float = 0.0) -> int:
        """Tokens of the look that makes most of its time, when a guess is right with a chance and takes seconds `each`
        to make: at most so many, and 1 where none pays.
        """
        if not self.known(rows):
            return 1
        if not self._costs or self.count % SEEN == 0:
            known = [width for width, look in self._looks.items() if look.sure]
            self._costs = [(width, self.cost(width)) for width in WIDTHS if width <= 2 * max(known, default=2)]
        saved, value = self.worth(rows)
        best, found = MARGIN, 1
        if saved + value * chance / max(1 - chance, LEAST) < best * self._costs[0][1]:
            return found  # not even if all that may be right came for as little as one guess
        for width, cost in self._costs:
            gain = (saved + expected(chance, width - 1) * value) / (cost + (width - 1) * each)
            if gain > best and width <= most:
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
