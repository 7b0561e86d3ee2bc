"""Requests to an engine, and what comes of them."""

from typing import Any

from fope_export.serving.engine import Engine
from fope_export.serving.requests import Event, Finished, Handle, Request, Token
from fope_export.serving.sampling import SamplingParams

ENDLESS = [[3], [4], [5], [6]]


def asked(prompt: list[int], new: int = 9, **fields: Any) -> Request:
    return Request(prompt=prompt, sampling=SamplingParams(max_new_tokens=new), **fields)


def shown(events: list[Event]) -> list[int | str]:
    """Tokens by their ids, the rest by what it says."""
    return [
        e.id if isinstance(e, Token) else e.reason if isinstance(e, Finished) else f"failed: {e.cause}" for e in events
    ]


def to_the_end(engine: Engine, *handles: Handle) -> list[list[int | str]]:
    for _ in range(1000):
        if not engine.step():
            return [shown(handle.take()) for handle in handles]
    raise AssertionError("it does not end")
