"""Guessing pays or rests, by a clock that the backend turns itself."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fope_export.backends.base import Ids, Logits, Slots
from fope_export.serving.engine import Counts, Engine
from fope_export.serving.pace import PATIENCE, RESTS, SURE, Pace, Trust, expected
from fope_export.serving.requests import Request
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.speculation import Speculation
from tests.knowing import Knowing, KnowingSlots, remembering

NEW = 1200
ALLOWED = 1.03


class Clock:
    """Time, as steps take it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("engine", "drafting"):
            monkeypatch.setattr(f"fope_export.serving.{module}.perf_counter", lambda: self.now)


class Timed(Knowing):
    """A step of some rows takes 1 + `row` for each beyond the first, and one of several tokens in a row 1 + `token` for
    each beyond the first, all of it times `unit`.
    """

    def __init__(self, known: Knowing, clock: Clock, *, token: float, row: float = 0.5, unit: float = 1.0) -> None:
        super().__init__(known.vocab_size, known.says)
        self.clock, self.token, self.row, self.unit = clock, token, row, unit

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:
        return TimedSlots(self, count)


class TimedSlots(KnowingSlots):
    def __init__(self, backend: Timed, count: int) -> None:
        super().__init__(backend, count)
        self._timed = backend

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        self._timed.clock.now += self._timed.unit * (1 + (len(ids) - 1) * self._timed.token)
        return super().prefill(slot, ids, start, last=last)

    def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
        self._timed.clock.now += self._timed.unit * (1 + (len(slots) - 1) * self._timed.row)
        return super().decode(slots, tokens)


def by_place(text: Sequence[int]) -> Knowing:
    """Says a text, token by token."""

    def says(row: Sequence[int]) -> Logits:
        logits: Logits = np.zeros(max(text) + 2, np.float32)
        logits[text[len(row)]] = 1
        return logits

    return Knowing(max(text) + 2, says)


def seconds(backend: Timed, speculation: Speculation | None, prompts: Sequence[Sequence[int]]) -> tuple[float, Counts]:
    """Of all answers after their first tokens."""
    engine = Engine(backend, len(prompts), speculation=speculation, budget=0)
    for prompt in prompts:
        engine.submit(Request(prompt=prompt, sampling=SamplingParams(max_new_tokens=NEW)))
    engine.step()
    began = backend.clock.now
    while engine.step():
        pass
    return backend.clock.now - began, engine.counts


def noise(size: int = 200) -> list[int]:
    """Nothing repeats but by chance."""
    return [int(token) for token in np.random.default_rng(0).integers(0, size, NEW + 10)]


def misleading(alike: int) -> list[int]:
    """The same few tokens again and again, and after them never what came before."""
    rng, text = np.random.default_rng(0), list[int]()
    while len(text) < NEW + 10:
        text += [*range(100, 100 + alike), *map(int, rng.integers(0, 100, 2))]
    return text


def repeating() -> list[int]:
    """A paragraph, again and again."""
    paragraph = noise()[:100]
    return paragraph * (NEW // 100 + 2)


def changing() -> list[int]:
    """Half of it repeats, half does not."""
    rng = np.random.default_rng(0)
    return [token for _ in range(20) for token in (*noise()[:50], *map(int, rng.integers(0, 200, 50)))]


TEXTS: dict[str, Callable[[], list[int]]] = {
    "noise": noise, "misleading": lambda: misleading(4), "misled for long": lambda: misleading(14),
    "repeating": repeating, "changing": changing,
}  # fmt: skip


@pytest.mark.parametrize(("rows", "token"), [(1, 0.05), (1, 0.3), (1, 1.0), (3, 0.1)])
@pytest.mark.parametrize("name", TEXTS)
def test_it_is_never_slower_than_without(name: str, rows: int, token: float, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Timed(by_place(TEXTS[name]()), Clock(monkeypatch), token=token)
    prompts = [TEXTS[name]()[:8]] * rows
    plain, _ = seconds(backend, None, prompts)
    got, counts = seconds(backend, Speculation(), prompts)
    assert got <= ALLOWED * plain and counts.new_tokens == rows * NEW
    if rows == 1 and token <= 0.3 and name in ("repeating", "changing"):
        assert got < (0.5 if name == "repeating" else 0.85) * plain and counts.looks > 0


@pytest.mark.parametrize("unit", [0.02, 0.9])
@pytest.mark.parametrize("wrong", [1, 2, 10])
def test_a_draft_costs_little_where_it_does_not_pay(wrong: int, unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, text = Clock(monkeypatch), noise()
    backend = Timed(by_place(text), clock, token=0.1)
    follows = {tuple(text[:i]): text[i] for i in range(len(text))}
    draft = Timed(remembering(backend.vocab_size, follows, wrong=wrong), clock, token=0.1, unit=unit)
    plain, _ = seconds(backend, None, [text[:8]])
    got, counts = seconds(backend, Speculation(draft=draft), [text[:8]])
    assert got <= ALLOWED * plain and counts.guesses > 0
    if unit < 0.1 and wrong == 10:
        assert got < 0.5 * plain


def test_the_look_that_is_taken_makes_most_of_its_time() -> None:
    pace = Pace()
    assert pace.width(0.9, 1, 99) == 1  # nothing is known
    for width, cost in [(1, 1.0), (2, 1.2), (4, 1.4), (8, 2.5), (16, 4.6)] * SURE:
        pace.look(width, cost) if width > 1 else pace.step(1, cost)
    gains = {chance: pace.width(chance, 1, 99) for chance in (0.05, 0.5, 0.8, 0.99)}
    assert gains == {0.05: 1, 0.5: 4, 0.8: 4, 0.99: 16} and pace.width(0.99, 1, 7) == 4
    assert pace.width(0.8, 1, 99, 1.0) == 1  # the guesses themselves are too slow
    for _ in range(SURE):
        pace.step(2, 1.1)  # a row more costs nearly nothing, and a look is a step of its own
    assert pace.width(0.5, 2, 99) == 1 and pace.width(0.99, 2, 99) == 16


def test_what_a_row_saves_is_what_is_known() -> None:
    pace = Pace()
    for rows, cost in [(1, 1.0), (3, 1.8), (4, 2.0)] * SURE:
        pace.step(rows, cost)
    assert pace.worth(1) == (1.0, 1.0) and pace.worth(3)[0] == 0
    assert pace.worth(4)[0] == pytest.approx(0.2) and pace.worth(4)[1] == 0.5


def test_old_looks_are_forgotten() -> None:
    pace = Pace()
    pace.step(1, 1.0)
    pace.look(4, 9.0)
    assert pace.cost(4) < 3.0 and pace.cost(8) < 2.0  # it may have been something else
    for _ in range(SURE):
        pace.look(4, 9.0)
    assert pace.cost(4) == 9.0 and pace.cost(8) > 9.0
    pace.count = 10_000
    assert pace.cost(4) < 2.0


def test_expected() -> None:
    for chance in (0.0, 0.3, 1.0):
        assert expected(chance, 3) == pytest.approx(chance + chance**2 + chance**3)


def test_rests_grow_while_all_is_lost_and_end() -> None:
    trust, rests = Trust(), list[int]()
    for _ in range(8):
        trust.settle(-PATIENCE - 1, 1.0)
        rests.append(0)
        while trust.rests():
            rests[-1] += 1
    assert rests[0] == RESTS[0] - 1 and rests[1] == 2 * RESTS[0] - 1 and max(rests) == RESTS[1] - 1
    trust.settle(PATIENCE, 1.0)
    trust.settle(-2 * PATIENCE - 1, 1.0)
    assert sum(trust.rests() for _ in range(RESTS[1])) == RESTS[0] - 1
