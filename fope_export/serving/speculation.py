"""Guesses of an engine's next tokens, which one step can look at together: who makes them, and whether they pay."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fope_export.backends.base import Backend, Slots
from fope_export.errors import ConfigError
from fope_export.serving.drafting import Asked, Draft
from fope_export.serving.pace import Pace, Trust
from fope_export.serving.work import Work

TIMED = 4
"""One in so many steps is timed, once it is known what they take."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speculation:
    """How an engine guesses ahead: what followed the last tokens where they stood before in the text, else what a
    `draft` says, a backend with a smaller model on the same tokens. Guesses never change what is drawn; right ones are
    several tokens of one step. There are `most` of them at once wherever there is something to guess by; None is as
    many as pay by the time that steps take, and none while they do not.

    Raises ConfigError for none at all.

    >>> import fope_export as fx
    >>> engine = fx.Engine(fx.load_backend("out"), speculation=fx.Speculation())
    """

    most: int | None = None
    draft: Backend | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise ConfigError(f"{self.most} tokens are to be guessed, expected 1 or more", hint="Or guess none.")


class _Kind:
    """One of the ways to guess."""

    def __init__(self) -> None:
        self.trust, self.resting = Trust(), False


class Ahead:
    """Guesses for the works of an engine, and what comes of them. It is told what every step took."""

    def __init__(self, how: Speculation, backend: Backend, slots: Slots, room: int) -> None:
        """Raises BackendError where the draft has not as many slots, and ConfigError where it has other tokens."""
        self._most, self._capacity, self._pace = how.most, slots.capacity, Pace()
        if how.draft is not None and how.draft.vocab_size != backend.vocab_size:
            raise ConfigError(
                f"the draft has {how.draft.vocab_size} tokens, and the model {backend.vocab_size}",
                hint="A draft model is trained on the same tokens.",
            )
        self._draft = Draft(how.draft, slots.count, room) if how.draft else None
        self._lookups, self._drafts = _Kind(), _Kind()
        self._rows, self._drafted = 0, frozenset[Work]()
        self._stirred: _Kind | None = None
        """What kind the looks since the last step were."""

    def guess(self, works: Sequence[Work], held: Sequence[Sequence[int]]) -> list[list[int]]:
        """The next tokens of each work after its last, perhaps none. `held` is what each slot holds."""
        self._pace.count, self._rows = self._pace.count + 1, len(works)
        for kind in (self._lookups, self._drafts):
            kind.resting = self._most is None and kind.trust.rests()
        made = [self._look_up(work, held[work.slot]) for work in works]
        if self._draft:
            self._ask(self._draft, [(number, work) for number, work in enumerate(works) if not made[number]], made)
        return made

    def _look_up(self, work: Work, held: Sequence[int]) -> list[int]:
        """What a work's text says, which is read when that may matter."""
        text = work.lookup
        if not self._draft and (self._lookups.resting or len(held) - len(text.text) < text.may_wait):
            return []
        _read(work, held)
        chance = text.chance
        return text.guess(self._width(self._lookups, work, chance) - 1) if chance else []

    def _width(self, kind: _Kind, work: Work, chance: float, seconds: float = 0.0) -> int:
        """Tokens of a look at guesses that are right with a chance and take as many seconds each; 1 for none."""
        if not chance or kind.resting:
            return 1
        room = work.left
        if self._capacity is not None:
            room = min(room, self._capacity - len(work.lookup.text) + 1)
        if self._most is not None:
            return max(min(room, self._most + 1), 1)
        return self._pace.width(chance, self._rows, room, seconds)

    def _ask(self, draft: Draft, works: Sequence[tuple[int, Work]], made: list[list[int]]) -> None:
        """Have the draft guess for works, by their numbers. One that fails is not asked again."""
        asked = {}
        for number, work in works:
            width = self._width(self._drafts, work, draft.chance(work), draft.seconds)
            if width > 1:
                asked[number] = Asked(work, work.lookup.text, width - 1)
        try:
            for number, guesses in zip(asked, draft.guess([*asked.values()]), strict=True):
                made[number] = guesses
        except Exception:
            log.warning("the draft model failed, and is not asked again", exc_info=True)
            self._draft = None
        self._drafted = frozenset(each.work for each in asked.values())

    def stepped(self, rows: int, seconds: float) -> None:
        """A step of one token in so many rows took as long."""
        known, kind = self._pace.known(rows), self._stirred
        if kind is None:
            if self._pace.count % TIMED == 0 or not known:
                self._pace.step(rows, seconds)
        elif known:
            kind.trust.settle(max(min(known - seconds, known), -known), known)
        self._stirred = None

    def looked(self, work: Work, guesses: int, right: int, seconds: float) -> None:
        """A look at so many guesses of a work, of which the first `right` were drawn, took as long."""
        width, each = guesses + 1, 0.0
        self._pace.look(width, seconds)
        self._stirred = self._lookups
        if self._draft and work in self._drafted:
            self._draft.note(work, right, guesses)
            self._stirred, each = self._drafts, self._draft.seconds
        if known := self._pace.known(self._rows):
            saved, value = self._pace.worth(self._rows)
            cost = self._pace.cost(width) + guesses * each
            self._stirred.trust.settle(saved + right * value - cost, known)

    def close(self) -> None:
        """Give the draft's slots back."""
        if self._draft:
            self._draft.close()


def _read(work: Work, held: Sequence[int]) -> None:
    """Tell a work's lookup what is new in its text: what is held, and the last token, which is not."""
    text = work.lookup
    if text.text:
        for token in held[len(text.text) :]:
            text.add(token)
    else:
        text.begin(held)
    text.add(work.last)
