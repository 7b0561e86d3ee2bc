"""A host whose backend fails."""

import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from fope_export.bundle import Bundle
from fope_export.errors import BackendError
from fope_export.serving.host import Host, Sizes, bytes_of_a_token
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


def failure(handle: Handle) -> Exception:
    """What it ended with, when it did."""
    events = list[Any]()

    def failed() -> bool:
        events.extend(handle.take())
        return bool(events) and isinstance(events[-1], Failed)

    until(failed)
    return events[-1].cause  # type: ignore[no-any-return]


@pytest.fixture
def backend() -> Scripted:
    return Scripted([[3]])


@pytest.fixture
def host(asked: Bundle, backend: Scripted) -> Iterator[Host]:
    host = Host("scripted", asked, lambda: backend, Sizes(slots=2))
    host.start()
    yield host
    host.close()


@pytest.mark.parametrize(("length", "spare", "room"), [(700, 0, 700), (1 << 30, 0, 1 << 20), (1 << 30, 1 << 42, 1024)])
def test_slots_have_room_from_the_start(
    length: int, spare: int, room: int, asked: Bundle, backend: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all that may be asked, within bounds: a long prompt then moves nobody's keys and values."""
    slots = Mock(wraps=backend.slots)
    monkeypatch.setattr(backend, "slots", slots)
    token = bytes_of_a_token(asked.manifest.decoder(), "fp32")
    monkeypatch.setattr("fope_export.serving.host.RESERVED", 2 * token << 20)
    host = Host("scripted", asked, lambda: backend, Sizes(slots=2, length=length, spare_bytes=spare * token))
    host.start()
    host.close()
    assert slots.call_args.args[1] == room


def test_a_backend_that_failed_is_tried_before_it_is_ready(
    host: Host, backend: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared, clear = list[bool](), host._ready.clear

    def noted() -> None:
        clear()
        cleared.append(host.ready)

    monkeypatch.setattr(host._ready, "clear", noted)
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
