"""What a request may ask of the engine, and what the engine promises about it."""

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, BusyError
from fope_export.generation import log_probabilities
from fope_export.graph.optimize import optimize
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Logprobs, Request, Token, logprobs
from fope_export.serving.sampling import SamplingParams
from tests.scripted import Scripted
from tests.serving.stepping import ENDLESS, asked, shown, to_the_end


def test_a_queue_that_is_full_takes_nothing() -> None:
    engine = Engine(Scripted(ENDLESS), 1, queue=2, queued_tokens=5)
    handles = [engine.submit(asked([1], 1)) for _ in range(3)]  # one of them will have the slot
    with pytest.raises(BusyError, match="3 requests would wait, and 2 may"):
        engine.submit(asked([2]))
    engine.step()
    with pytest.raises(BusyError, match="6 tokens of prompts would wait, and 5 may"):
        engine.submit(asked([2, 2, 2, 2, 2]))
    assert to_the_end(engine, *handles) == [[3, "length"]] * 3
    (whole,) = to_the_end(engine, engine.submit(asked([2] * 9, 1)))  # what fits a free slot waits for nobody
    assert whole == [4, "length"]


def test_a_deadline_ends_a_request_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fope_export.serving.requests.monotonic", lambda: now)
    engine = Engine(Scripted(ENDLESS), 1)
    running, waiting = (engine.submit(asked([1], deadline=at)) for at in (2.0, 1.0))
    engine.step()
    now = 1.0
    engine.step()
    assert shown(waiting.take()) == ["deadline"] and shown(running.take()) == [3, 3]
    now = 2.0
    assert not engine.step()
    assert shown(running.take()) == ["deadline"]


def test_rows_to_spare_keep_what_was_held() -> None:
    backend = Scripted(ENDLESS)
    engine = Engine(backend, 1, spare=1)
    for head in (7, 8):
        to_the_end(engine, engine.submit(asked([head] * 20, 1)))
    (again,) = [engine.submit(asked([7] * 20 + [9], 1))]
    to_the_end(engine, again)
    assert again.cached == 20 and engine.counts.cached_tokens == 20
    assert engine.counts.prompt_tokens == 61 and engine.counts.new_tokens == 3


def test_each_request_hears_when_something_happened_to_it() -> None:
    heard: list[str] = []
    engine = Engine(Scripted(ENDLESS), 2)
    for name, count in (("a", 1), ("b", 2)):
        engine.submit(asked([1], count), partial(heard.append, name))
    engine.step()
    assert heard == ["a", "b"]
    engine.step()
    assert heard == ["a", "b", "b"]


def test_a_prompt_may_be_scored_alone(bundle: Bundle) -> None:
    ids = [72, 105, 33, 72, 105]
    for chunk in (0, 2):
        backend = load_backend(bundle, "onnxruntime")
        engine = Engine(backend, 1, chunk=chunk)
        handle = engine.submit(asked(ids, 0, prompt_logprobs=2))
        assert to_the_end(engine, handle) == [["length"]]
        scores = log_probabilities(backend, ids, chunk=chunk)
        np.testing.assert_allclose([each.own for each in handle.prompt_logprobs], scores, rtol=1e-12)
        assert all(each.top[0][1] >= max(each.top[1][1], each.own) for each in handle.prompt_logprobs)


def test_tokens_tell_how_likely_they_were() -> None:
    row = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    told = logprobs(row + 5, 1, 2)
    np.testing.assert_allclose([told.own, *(value for _, value in told.top)], np.log([0.2, 0.4, 0.3]))
    assert [token for token, _ in told.top] == [3, 2] and logprobs(row, 1, 0).top == ()
    engine = Engine(Scripted(ENDLESS), 1)
    handle = engine.submit(asked([1], 1, logprobs=1))
    engine.step()
    token = handle.take()[0]
    assert isinstance(token, Token) and token.logprobs is not None
    assert token.logprobs.top[0] == (token.id, token.logprobs.own)


def test_an_answer_does_not_end_too_early() -> None:
    engine = Engine(Scripted([[3, 3, 3, 3]]), 1)
    sampling = SamplingParams(max_new_tokens=9, min_new_tokens=2)
    (told,) = to_the_end(engine, engine.submit(Request(prompt=[1], sampling=sampling, ends={3})))
    assert told[2:] == [3, "stop"] and 3 not in told[:2]


class Even:
    """Lets even tokens come, twice."""

    done = False

    def __init__(self) -> None:
        self.came: list[int] = []

    def allowed(self) -> NDArray[np.bool_]:
        return np.array([token % 2 == 0 for token in range(10)])

    def accept(self, token: int) -> None:
        self.came.append(token)
        self.done = len(self.came) == 2


def test_a_grammar_says_what_may_come_and_when_it_is_whole() -> None:
    engine, grammar = Engine(Scripted(ENDLESS), 1), Even()
    (told,) = to_the_end(engine, engine.submit(asked([1], grammar=grammar)))
    assert [*grammar.came, "stop"] == told and all(token % 2 == 0 for token in grammar.came)


def test_a_grammar_and_a_bias_that_exclude_each_other_end_that_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, grammar = Engine(Scripted(ENDLESS), 2), Even()
    monkeypatch.setattr(grammar, "allowed", lambda: np.zeros(10, np.bool_))
    failing, other = engine.submit(asked([1], grammar=grammar)), engine.submit(asked([1], 1))
    told = to_the_end(engine, failing, other)
    assert "no token may come next" in str(told[0][0]) and told[1][-1] == "length"


def numbers(engine: Engine, *requests: Request) -> list[list[tuple[int, Logprobs | None]]]:
    """Tokens of each answer with what is told of them, to the last bit."""
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return [[(e.id, e.logprobs) for e in handle.take() if isinstance(e, Token)] for handle in handles]


def test_an_invariant_engine_answers_alike_in_any_company(spoilable: Bundle) -> None:
    backend = load_backend(optimize(spoilable))
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    asked, *others = [
        Request(prompt=rng.integers(0, 256, length).tolist(), sampling=sampling, logprobs=3)
        for length in (70, 5, 33, 80)
    ]
    engine = Engine(backend, 4, chunk=32, spare=2, invariant=True)
    alone, cached = numbers(engine, asked), numbers(engine, asked)
    assert engine.counts.cached_tokens == 64 and cached == alone
    assert numbers(engine, *others, asked)[-1] == alone[0]
    follow = Request(prompt=[*asked.prompt, *(token for token, _ in alone[0]), 7, 8], sampling=sampling, logprobs=3)
    again = numbers(engine, others[0], follow)[-1]  # what an answer's own steps wrote is not taken
    fresh = Engine(backend, 4, chunk=32, spare=2, invariant=True)
    assert numbers(fresh, follow)[0] == again and numbers(fresh, asked) == alone
    for each in (engine, fresh):
        each.close()


def test_who_cannot_be_invariant_says_so(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="runs the rows that a step names") as told:
        Engine(load_backend(bundle, variant="portable"), 2, invariant=True)
    assert "fope-export optimize" in told.value.hint
