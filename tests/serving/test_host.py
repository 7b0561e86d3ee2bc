"""A host whose backend fails."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fope_export.bundle import Bundle
from fope_export.errors import BackendError
from fope_export.serving.host import Host, Sizes
from fope_export.serving.requests import Failed, Handle, Request
from fope_export.serving.sampling import SamplingParams
from tests.scripted import Scripted

LONG = Request(prompt=[1], sampling=SamplingParams(max_new_tokens=1_000_000))


def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it never comes")


def failure(handle: Handle) -> Exception | None:
    """What it ended with, when it did."""
    events = list[Any]()
    until(lambda: events.extend(handle.take()) or (bool(events) and isinstance(events[-1], Failed)))
    return events[-1].cause if isinstance(events[-1], Failed) else None


@pytest.fixture
def backend() -> Scripted:
    return Scripted([[3]])


@pytest.fixture
def host(asked: Bundle, backend: Scripted) -> Iterator[Host]:
    host = Host("scripted", asked, lambda: backend, Sizes(slots=2))
    host.start()
    yield host
    host.close()


def test_a_backend_that_failed_is_tried_before_it_is_ready(
    host: Host, backend: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared, clear = list[bool](), host._ready.clear
    monkeypatch.setattr(host._ready, "clear", lambda: (clear(), cleared.append(host.ready)))
    backend.fails = "decode"
    handle = host.submit(LONG, lambda: setattr(backend, "fails", "" if "free" in backend.log[-1] else "decode"))
    assert str(failure(handle)).startswith("decode")
    until(lambda: host.ready and cleared == [False])
    assert backend.log[-2].startswith("prefill") and backend.log[-1].startswith("decode") and host.alive


def test_a_backend_that_fails_for_ever_is_dead(host: Host, backend: Scripted) -> None:
    backend.fails = "prefill"
    assert failure(host.submit(LONG))
    until(lambda: not host.alive)
    with pytest.raises(BackendError, match="scripted is not ready"):
        host.submit(LONG)


def test_an_engine_that_fails_takes_its_requests_along(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    first = host.engine
    assert first is not None
    handle = host.submit(LONG)
    until(lambda: first.running == 1)
    monkeypatch.setattr(first, "_admit", lambda: 1 // 0)
    assert isinstance(failure(handle), ZeroDivisionError)
    until(lambda: host.ready and host.engine is not first)
    assert host.submit(LONG)


def test_who_is_not_done_when_it_closes_is_told(host: Host) -> None:
    handle = host.submit(LONG)
    host.close()
    assert "shutting down" in str(failure(handle))
