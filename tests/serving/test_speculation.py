"""Guesses change no answer: what is drawn after them is what is drawn without."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from guessing import Answer, answers, cases, parted
from numpy.typing import NDArray
from serving_bench.ties import Judge

from fope_export.backends.base import Backend, Ids, Logits, Slots
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.errors import ConfigError
from fope_export.graph.optimize import optimize
from fope_export.serving.engine import Engine
from fope_export.serving.lookup import ORDERS, Lookup
from fope_export.serving.requests import Event, Request
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.speculation import Speculation
from fope_export.serving.work import Work
from tests.knowing import Knowing, chained, remembering
from tests.serving.stepping import shown

CASES = 200
KINDS = ["portable", "optimized", "static", "openvino", "torch"]


@pytest.fixture(scope="module")
def judge(bundle: Bundle) -> Judge:
    return Judge(bundle)


@pytest.fixture(scope="module", params=KINDS)
def real(
    request: pytest.FixtureRequest, bundle: Bundle, static_bundle: Bundle, asked: Bundle, tmp_path_factory: Any
) -> Backend:
    if request.param == "openvino":
        folder = shutil.copytree(bundle.path, tmp_path_factory.mktemp("guessed") / "openvino")
        return load_backend(optimize(Bundle.open(folder), "openvino"), "openvino")
    made = {"static": static_bundle, "optimized": asked}.get(request.param, bundle)
    return load_backend(made, "torch" if request.param == "torch" else None)


ASKED = cases(CASES, 256, new=32)


@pytest.fixture(scope="module")
def plain(real: Backend) -> list[Answer]:
    return answers(real, ASKED, 3, None)[0]


@pytest.mark.parametrize("most", [None, 5])
def test_answers_are_those_without_guesses(most: int | None, real: Backend, plain: list[Answer], judge: Judge) -> None:
    got, counts = answers(real, ASKED, 3, Speculation(most, clairvoyant(plain)))
    listed = [*parted(ASKED, plain, got, judge)]
    assert all(each["near-tie"] for each in listed), listed
    assert counts.new_tokens > 10 * CASES and 0 < counts.right_guesses < counts.guesses
    if most:
        assert counts.looks > CASES and counts.right_guesses > 3 * CASES and counts.guesses > 5 * CASES


def clairvoyant(plain: Sequence[Answer]) -> Knowing:
    """A draft that knows what comes, and is wrong in one of five cases."""
    texts = [([*request.prompt], tokens) for request, (tokens, _) in zip(ASKED, plain, strict=True)]
    follows = {(*prompt, *made[:i]): token for prompt, made in texts for i, token in enumerate(made)}
    return remembering(256, follows, wrong=5)


class Spoiled:
    """Slots with a mistake."""

    def __init__(self, slots: Slots, mistake: str) -> None:
        self._slots, self._mistake = slots, mistake

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slots, name)

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        return self._slots.prefill(slot, ids, start - (self._mistake == "positions" and not last), last=last)

    def copy(self, source: int, target: int, tokens: int) -> None:
        if not (self._mistake == "stale" and source == target):
            self._slots.copy(source, target, tokens)


class Accepting(Engine):
    """Takes every guess for what was drawn."""

    _coming: Sequence[int] = ()

    def _look(self, work: Work, guess: Sequence[int]) -> None:
        self._coming = guess
        super()._look(work, guess)
        self._coming = ()

    def _draw(self, ready: Sequence[Work]) -> None:
        super()._draw(ready)
        if self._coming:
            ready[0].last, self._coming = self._coming[0], self._coming[1:]


@pytest.mark.parametrize("mistake", ["accepted", "positions", "stale"])
def test_mistakes_are_noticed(
    mistake: str, real: Backend, plain: list[Answer], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = real.slots
    monkeypatch.setattr(real, "slots", lambda *given, **named: Spoiled(slots(*given, **named), mistake))
    asked = [replace(each, logprobs=None) for each in ASKED[:80]]
    got, _ = answers(real, asked, 3, Speculation(5), Accepting if mistake == "accepted" else Engine)
    assert not all(each["near-tie"] for each in parted(asked, plain[:80], got, judge))


def everything(number: int, grammar: Any = None) -> Request:
    """All that a request may ask for."""
    (request,) = cases(1, 24, new=24, seed=number)
    told = {"logprobs": 3} if number % 2 else {}
    return Request(
        prompt=request.prompt, sampling=request.sampling, ends={number % 24}, choice=number % 3, grammar=grammar, **told
    )


def events(numbers: Sequence[int], speculation: Speculation | None, *, evenly: bool) -> list[list[Event]]:
    engine = Engine(chained(), 3, speculation=speculation)
    handles = [engine.submit(everything(number, Even(24) if evenly else None)) for number in numbers]
    while engine.step():
        pass
    return [handle.take() for handle in handles]


class Even:
    """Lets even tokens come, six times."""

    def __init__(self, size: int) -> None:
        self._size, self._count, self.done = size, 0, False

    def allowed(self) -> NDArray[np.bool_]:
        allowed: NDArray[np.bool_] = np.arange(self._size) % 2 == 0
        return allowed

    def accept(self, token: int) -> None:
        assert token % 2 == 0
        self._count += 1
        self.done = self._count == 6


@pytest.mark.parametrize("evenly", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("speculation", [Speculation(), Speculation(1), Speculation(6, chained()), Speculation(3)])
def test_all_that_is_told_is_the_same_to_the_last_bit(speculation: Speculation, *, evenly: bool) -> None:
    assert events(range(CASES), speculation, evenly=evenly) == events(range(CASES), None, evenly=evenly)


def test_what_is_held_is_what_was_drawn() -> None:
    backend = chained()
    engine, plain = Engine(backend, 2, speculation=Speculation(6, backend)), Engine(backend, 2)
    for each in (engine, plain):
        for number in (3, 5, 7):
            each.submit(everything(number))
        while each.step():
            pass
    assert engine._held.tokens == plain._held.tokens and engine.counts.right_guesses > 0


def test_a_draft_of_the_same_model_is_always_right() -> None:
    engine = Engine(chained(), 1, speculation=Speculation(4, chained()))
    sampling = SamplingParams(max_new_tokens=21, temperature=1.0, seed=3)
    handle = engine.submit(Request(prompt=[1, 2, 3, 4], sampling=sampling))
    while engine.step():
        pass
    assert engine.counts.guesses == engine.counts.right_guesses == 16
    assert handle.steps == 4 and handle.tokens_per_step == 5


def test_a_draft_that_fails_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    backend, draft = chained(), chained()
    draft.says = lambda row: np.zeros(1 // 0)
    request = Request(prompt=[1, 2], sampling=SamplingParams(max_new_tokens=9))
    told = []
    for speculation in (None, Speculation(4, draft)):
        engine = Engine(backend, 1, speculation=speculation)
        handle = engine.submit(request)
        while engine.step():
            pass
        told.append(shown(handle.take()))
    assert told[0] == told[1] and "the draft model failed" in caplog.text


def test_refusals(asked: Bundle) -> None:
    with pytest.raises(ConfigError, match="the draft has 25 tokens, and the model 24"):
        Engine(chained(), speculation=Speculation(draft=chained(25)))
    with pytest.raises(ConfigError, match="0 tokens are to be guessed"):
        Speculation(0)
    with pytest.raises(ConfigError, match="rounded otherwise") as told:
        Engine(load_backend(asked), invariant=True, speculation=Speculation())
    assert "--batch-invariant" in told.value.hint


def test_a_full_slot_is_full_with_guesses_too(static_bundle: Bundle) -> None:
    backend = load_backend(static_bundle)
    request = Request(prompt=[5, 6, 7] * 60, sampling=SamplingParams(max_new_tokens=99, logit_bias={5: 50.0}))
    told = [answers(backend, [request], 1, speculation)[0] for speculation in (None, Speculation(9))]
    assert told[0] == told[1] and "201 tokens do not fit" in told[0][0][1]


def test_a_lookup_finds_what_the_longest_alike_says() -> None:
    """And no longer ago than the last that was so."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = rng.integers(0, 3, 60).tolist()
        lookup = Lookup()
        lookup.begin(text)
        for order in ORDERS:
            ends = [i for i in range(order, len(text)) if text[i - order : i] == text[-order:]]
            if ends:
                assert lookup.guess(1) == [text[ends[-1]]] and 0 < lookup.chance < 1
                break
        else:
            assert lookup.guess(1) == [] and lookup.chance == 0


def test_a_lookup_goes_on_while_it_is_right_and_knows_how_often_it_was() -> None:
    lookup = Lookup()
    lookup.begin([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert lookup.guess(3) == [4, 5, 6] and lookup.guess(9) == [4, 5, 6, 7, 1, 2, 3, 4, 5]
    doubt = lookup.chance
    for token in (4, 5):
        lookup.add(token)
    assert lookup.guess(2) == [6, 7] and lookup.chance > doubt
    lookup.add(9)
    assert lookup.guess(1) == [] and Counter(lookup.text)[9] == 1
