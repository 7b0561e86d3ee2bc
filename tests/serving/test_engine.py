"""The engine, step by step."""

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest

from fope_export.backends.base import Ids, Logits
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, ConfigError
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Handle, Request
from fope_export.serving.sampling import SamplingParams
from tests.scripted import Companionable, Scripted, ScriptedSlots
from tests.serving.stepping import ENDLESS, asked, shown, to_the_end
from tests.support import answers


def rows_of(engine: Engine) -> list[list[int]]:
    """What the slots hold, as the backend sees it."""
    assert isinstance(engine._slots, ScriptedSlots) and engine._held.tokens == engine._slots.rows
    return engine._slots.rows


def prompts_of(backend: Scripted) -> list[str]:
    """What was done for prompts."""
    return [call for call in backend.log if not call.startswith("decode")]


def test_requests_join_and_leave_at_any_step() -> None:
    backend = Scripted(ENDLESS)
    engine = Engine(backend, 2)
    first = engine.submit(asked([1], 4))
    assert engine.step() and shown(first.take()) == [3]
    second, third = engine.submit(asked([2], 2)), engine.submit(asked([3], 2, ends={5}))
    assert engine.step() and shown(first.take()) == [3] and shown(second.take()) == [4]
    assert engine.step() and shown(second.take()) == [4, "length"]
    assert shown(third.take()) == []  # there was no slot
    assert not engine.step()
    assert shown(first.take()) == [3, 3, "length"] and shown(third.take()) == [5, "stop"]
    assert not engine.step()  # nothing to do is no error
    assert backend.log == [
        "prefill 0 [1] 0", "decode {0: 3}", "prefill 1 [2] 0", "decode {0: 3, 1: 4}", "decode {0: 3}", "prefill 1 [3] 0"
    ]  # fmt: skip


def test_a_long_prompt_delays_the_others_by_a_chunk_a_token() -> None:
    backend = Scripted(ENDLESS)
    engine = Engine(backend, 2, chunk=4)
    first = engine.submit(asked([1], 9))
    engine.step()
    second = engine.submit(asked([9, 9, 9, 9, 8, 8, 8, 8, 2], 1))
    for _ in range(2):
        engine.step()
    assert shown(first.take()) == [3, 3, 3] and shown(second.take()) == []
    engine.step()
    assert shown(first.take()) == [3] and shown(second.take()) == [4, "length"]
    assert [call for call in backend.log if "prefill 1" in call] == [
        "prefill 1 [9, 9, 9, 9] 0", "prefill 1 [8, 8, 8, 8] 4", "prefill 1 [2] 8"
    ]  # fmt: skip


def test_short_prompts_share_the_budget_of_a_step() -> None:
    engine = Engine(Scripted(ENDLESS), 4, chunk=4)
    handles = [engine.submit(asked([9, 9, 1])), engine.submit(asked([9, 9, 9, 2]))]
    engine.step()
    assert [shown(handle.take()) for handle in handles] == [[3], []]  # 3 and 4 are more than 4
    engine = Engine(Scripted(ENDLESS), 4, chunk=4)
    handles = [engine.submit(asked([9, number])) for number in (1, 2, 3)]
    engine.step()
    assert [shown(handle.take()) for handle in handles] == [[3], [4], []]
    engine = Engine(Scripted(ENDLESS), 4, chunk=4, budget=0)
    handles = [engine.submit(asked([9] * 9 + [number])) for number in (1, 2, 3)]
    engine.step()
    assert [shown(handle.take()) for handle in handles] == [[3], [4], [5]]


def test_prompts_are_fed_together_where_the_backend_takes_them_so() -> None:
    backend, prefix = Companionable(ENDLESS), [7] * 20
    engine = Engine(backend, 6, chunk=50, budget=0)
    prompts = [[9, 1], [*prefix, 2], [8, 3], [*prefix, 8, 1]]
    handles = [engine.submit(asked(prompt, 1)) for prompt in prompts]
    assert to_the_end(engine, *handles) == [[3, "length"], [4, "length"], [5, "length"], [3, "length"]]
    assert backend.log == [
        "together [0, 1, 2]", "prefill 0 [9, 1] 0", f"prefill 1 {prompts[1]} 0", "prefill 2 [8, 3] 0",
        "copy 1 3 20", "prefill 3 [8, 1] 20",  # which waited for what it begins with
    ]  # fmt: skip
    backend.log.clear()
    to_the_end(engine, *(engine.submit(asked([number] * 19 + [1], 1)) for number in (4, 5, 6)))
    assert [call.split(" [")[0] for call in backend.log] == ["together", "prefill 4", "prefill 5", "prefill 0"]
    assert backend.log[0] == "together [4, 5]"  # 50 tokens hold no more
    backend.log.clear()
    told = Request(prompt=[6, 1], sampling=SamplingParams(max_new_tokens=1), prompt_logprobs=0)
    to_the_end(engine, *map(engine.submit, (asked([5, 1], 1), told, asked([4, 1], 1), asked([3, 1], 1))))
    assert [call.split()[0] for call in backend.log] == ["prefill", "prefill", "together", "prefill", "prefill"]


@pytest.mark.parametrize(("budget", "fed"), [(None, 2), (20, 1)])
def test_prompts_that_are_fed_together_share_the_budget_of_a_step(budget: int | None, fed: int) -> None:
    engine = Engine(Companionable(ENDLESS), 3, chunk=32, budget=budget)
    handles = [engine.submit(asked([9 - number] * 15 + [number], 1)) for number in (1, 2, 3)]
    engine.step()
    assert [len(handle.take()) for handle in handles] == [2] * fed + [0] * (3 - fed)


def test_prompts_that_fail_together_are_fed_one_by_one() -> None:
    backend = Companionable(ENDLESS, fails="together")
    engine = Engine(backend, 3)
    handles = [engine.submit(asked([number], 2)) for number in (1, 2, 3)]
    assert to_the_end(engine, *handles) == [[3, 3, "length"], [4, 4, "length"], [5, 5, "length"]]
    assert backend.log.count("together [0, 1, 2]") == 1 and engine.counts.failures == 0


def test_one_of_several_prompts_fails_alone() -> None:
    engine = Engine(Companionable(ENDLESS, fails="prefill 1"), 3)
    handles = [engine.submit(asked([number], 2)) for number in (1, 2, 3)]
    assert to_the_end(engine, *handles) == [[3, 3, "length"], ["failed: prefill 1 [2] 0"], [5, 5, "length"]]
    assert engine.counts.failures == 1


@pytest.mark.parametrize(("budget", "steps"), [(None, 3), (0, 1)])
def test_others_wait_for_no_more_than_512_tokens_whatever_the_backend_takes_fastest(
    budget: int | None, steps: int
) -> None:
    backend = Scripted(ENDLESS)
    backend.chunk = 2048
    engine = Engine(backend, 1, budget=budget)
    engine.submit(asked([9] * 1500, 1))
    to_the_end(engine)
    assert len(backend.log) == steps


def test_a_request_is_cancelled_wherever_it_is() -> None:
    backend = Scripted(ENDLESS)
    engine = Engine(backend, 2, chunk=2)
    handles = [engine.submit(asked(prompt)) for prompt in ([1], [9] * 20, [2])]
    engine.step()
    for handle in handles:
        handle.cancel()
    assert not engine.step()
    assert [shown(handle.take()) for handle in handles] == [[3, "cancelled"], ["cancelled"], ["cancelled"]]
    again = engine.submit(asked([2], 1))
    assert to_the_end(engine, again) == [[4, "length"]]


def test_who_waits_is_told_at_once_when_it_is_cancelled() -> None:
    engine = Engine(Scripted(ENDLESS), 1)
    first, second, third = (engine.submit(asked([number], 3)) for number in (1, 2, 3))
    engine.step()
    second.cancel()
    engine.step()
    assert shown(second.take()) == ["cancelled"] and shown(first.take()) == [3, 3]
    assert to_the_end(engine, first, third) == [[3, "length"], [5, 5, 5, "length"]]


def test_the_caller_may_go_on_with_its_list() -> None:
    backend, prompt = Scripted(ENDLESS), [9, 1]
    engine = Engine(backend, 1)
    handle = engine.submit(Request(prompt=prompt, sampling=SamplingParams(max_new_tokens=3)))
    prompt[0] = 8
    assert to_the_end(engine, handle) == [[3, 3, 3, "length"]] and backend.log[0] == "prefill 0 [9, 1] 0"


def test_a_failure_ends_that_request_alone() -> None:
    backend = Scripted(ENDLESS, fails="prefill 1")
    engine = Engine(backend, 2)
    good, bad = engine.submit(asked([1], 3)), engine.submit(asked([2], 3))
    assert to_the_end(engine, good, bad) == [[3, 3, 3, "length"], ["failed: prefill 1 [2] 0"]]
    assert "free 1" in backend.log  # what it holds is nobody's


def test_what_a_failed_request_left_serves_nobody() -> None:
    backend, prompt = Scripted(ENDLESS), [*[7] * 20, 1]
    engine = Engine(backend, 1)
    failing = engine.submit(asked(prompt, 3))
    engine.step()
    backend.fails = "decode"
    assert to_the_end(engine, failing) == [[3, "failed: decode {0: 3}"]]
    backend.fails = ""
    assert to_the_end(engine, engine.submit(asked(prompt, 1))) == [[3, "length"]]
    assert backend.log[-1] == f"prefill 0 {prompt} 0"


def test_one_answer_that_cannot_be_drawn_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ScriptedSlots):
        def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
            logits = super().decode(slots, tokens)
            if 1 in slots:
                logits[list(slots).index(1)] = np.nan
            return logits

    backend = Scripted(ENDLESS)
    monkeypatch.setattr(backend, "slots", lambda count, room, whole: Broken(backend, count))
    engine = Engine(backend, 2)
    good, bad = engine.submit(asked([1], 4)), engine.submit(asked([2], 4))
    assert to_the_end(engine, good, bad) == [
        [3, 3, 3, 3, "length"], [4, "failed: the model gives logits that are no numbers"]
    ]  # fmt: skip
    assert backend.log.count("decode {0: 3}") == 2  # no token was fed twice


def test_what_cannot_be_told_of_a_prompt_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no numbers")

    monkeypatch.setattr("fope_export.serving.engine.logprobs", broken)
    engine = Engine(Scripted(ENDLESS), 2)
    told = Request(prompt=[9, 1], sampling=SamplingParams(max_new_tokens=3), prompt_logprobs=0)
    handles = [engine.submit(told), engine.submit(asked([2], 2))]
    assert to_the_end(engine, *handles) == [["failed: no numbers"], [4, 4, "length"]]
    assert engine.counts.failures == 1


def test_a_failed_step_ends_what_was_in_it_and_no_more() -> None:
    backend = Scripted(ENDLESS, fails="decode")
    engine = Engine(backend, 2)
    handles = [engine.submit(asked([number], 3)) for number in (1, 2, 3)]
    engine.step()
    engine.step()
    backend.fails = ""
    first, second, third = to_the_end(engine, *handles)
    assert first == [3, "failed: decode {0: 3, 1: 4}"] and second == [4, "failed: decode {0: 3, 1: 4}"]
    assert third == [5, 5, 5, "length"]


def test_a_full_slot_fails_with_both_numbers() -> None:
    engine = Engine(Scripted(ENDLESS, capacity=3), 2)
    long, short = engine.submit(asked([9, 1], 5)), engine.submit(asked([2], 3))
    got = to_the_end(engine, long, short)
    assert got[1] == [4, 4, 4, "length"]
    assert got[0] == [3, 3, "failed: 4 tokens do not fit: there is room for 3"]


def test_what_a_slot_holds_serves_who_begins_alike() -> None:
    backend, prefix = Scripted(ENDLESS), [7] * 20
    engine = Engine(backend, 2)
    to_the_end(engine, engine.submit(asked([*prefix, 1], 2)))
    one, other = engine.submit(asked([*prefix, 2], 2)), engine.submit(asked([*prefix, 1, 3, 2], 2))
    assert to_the_end(engine, one, other) == [[4, 4, "length"], [4, 4, "length"]]
    few = engine.submit(asked([*prefix[:15], 3], 1))
    assert to_the_end(engine, few) == [[5, "length"]]
    assert rows_of(engine) == [[*prefix, 1, 3, 2, 4], [*prefix[:15], 3]]
    assert (
        prompts_of(backend)
        == [
            f"prefill 0 {[*prefix, 1]} 0",
            "copy 0 1 20",
            "prefill 1 [2] 20",
            "prefill 0 [2] 22",  # in place
            f"prefill 1 {[*prefix[:15], 3]} 0",  # too few to matter
        ]
    )


def test_a_conversation_finds_its_slot_again_and_strangers_take_the_others() -> None:
    backend, first = Scripted(ENDLESS), [*range(8), *range(8), *range(8), 1]
    engine = Engine(backend, 3)
    to_the_end(engine, engine.submit(asked(first, 3)))  # leaves the prompt and two tokens of the answer
    to_the_end(engine, engine.submit(asked([9, 9, 2], 1)))
    to_the_end(engine, engine.submit(asked([*range(8), *range(8), 5, 3], 1)))  # begins alike
    to_the_end(engine, engine.submit(asked([*first, 3, 3, 3, 1], 1)))
    to_the_end(engine, engine.submit(asked([8, 8, 4], 1)))
    rows_of(engine)
    assert prompts_of(backend) == [
        f"prefill 0 {first} 0", "prefill 1 [9, 9, 2] 0", "copy 0 2 16", "prefill 2 [5, 3] 16", "prefill 0 [3, 1] 27",
        "prefill 1 [8, 8, 4] 0",
    ]  # fmt: skip


def test_a_prompt_that_a_slot_holds_whole_is_fed_its_last_token() -> None:
    backend, prompt = Scripted(ENDLESS), [*[7] * 20, 1]
    engine = Engine(backend, 1)
    for _ in range(2):
        assert to_the_end(engine, engine.submit(asked(prompt, 2))) == [[3, 3, "length"]]
    assert backend.log[-2] == "prefill 0 [1] 20"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (asked([]), "a prompt is empty"),
        (asked([3, 10]), "token 10 is outside the vocabulary of 10"),
        (asked([-1]), "token -1 is outside"),
        (asked([1], choice=-1), "choice is -1, expected 0 or more"),
        (Request(prompt=[1], sampling=SamplingParams(logit_bias={10: 1.0})), "logit_bias adds"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused_when_it_comes(request_: Request, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Engine(Scripted(ENDLESS)).submit(request_)


def test_who_waits_for_the_whole_answer_is_woken_once() -> None:
    engine, woken = Engine(Scripted(ENDLESS), 2), list[str]()
    first = engine.submit(asked([1], 4), lambda: woken.append("each"))
    second = engine.submit(asked([2], 4), lambda: woken.append("whole"), each=False)
    to_the_end(engine)
    assert woken.count("each") == 4 and woken.count("whole") == 1
    assert len(first.take()) == len(second.take()) == 5 and 0 < first.first <= second.first


def test_the_queue_changes_under_its_lock_alone() -> None:
    """Who submits counts those that wait, in another thread."""

    class Queue(deque[Handle]):
        def popleft(self) -> Handle:
            assert engine._lock.locked()
            return super().popleft()

    engine = Engine(Scripted(ENDLESS), 1)
    engine._waiting = Queue()
    assert to_the_end(engine, engine.submit(asked([1], 1))) == [[3, "length"]]


def test_closing_tells_everybody() -> None:
    backend = Scripted(ENDLESS)
    engine = Engine(backend, 1)
    handles = [engine.submit(asked([number])) for number in (1, 2)]
    engine.step()
    engine.close()
    assert [shown(handle.take()) for handle in handles] == [[3, "cancelled"], ["cancelled"]]
    assert backend.log[-1] == "close"
    with pytest.raises(BackendError, match="the engine is closed"):
        engine.submit(asked([1]))


def test_others_submit_while_one_steps(bundle: Bundle) -> None:
    """And what a real model answers is what it answers alone."""
    backend = load_backend(bundle)
    engine, prompts = Engine(backend, 3, chunk=8), [[n, n + 1, n + 2] * (n + 1) for n in range(1, 9)]
    sampling, handles = SamplingParams(max_new_tokens=6, temperature=1.0, seed=5), dict[int, Handle]()

    def submit(number: int) -> None:
        handles[number] = engine.submit(Request(prompt=prompts[number], sampling=sampling))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
        engine.step()
    for thread in threads:
        thread.join()
    got = to_the_end(engine, *(handles[number] for number in range(len(prompts))))
    assert got == [[*answers(backend, [prompt], sampling)[0], "length"] for prompt in prompts]


def test_a_prompt_longer_than_a_slot_is_refused_when_it_comes(static_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="201 tokens do not fit: there is room for 200"):
        Engine(load_backend(static_bundle), 1).submit(asked([1] * 201))
