"""What a Dynamo frontend asks of a worker, and what it is told: token ids in and out."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from fope_export.deploy.base import shortest
from fope_export.serving.answers import named
from fope_export.serving.calls import calls_of_completion
from fope_export.serving.host import Host
from fope_export.serving.protocol import Completion, RequestError, parse
from fope_export.serving.requests import Event, Failed, Logprobs, Request, Token
from fope_export.tokens import Tokenizer

GROUPS = ("stop_conditions", "sampling_options", "output_options")
OTHERS = frozenset(
    (
        "model", "eos_token_ids", "mdc_sum", "annotations", "routing", "router_config_override", "extra_args",
        "_HEALTH_CHECK",
    )
)  # fmt: skip
"""Beside the groups and token_ids: what is told to routers, and marks the worker's own probe."""
FRONTEND = frozenset(
    ("stop", "include_stop_str_in_output", "skip_special_tokens", "formatted_prompt", "return_tokens_as_token_ids")
)
"""What the frontend itself does with an answer."""
ENDS = ("stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden")
ELSEWHERE = "`fope-export serve` has it."


def request_of(host: Host, asked: Mapping[str, Any]) -> Request:
    """The engine's request for one of token ids. After a migration its prompt also has what was answered before, and
    its limits are what is left of them; drawing goes on, as it depends on the place alone.

    Raises RequestError naming the field that cannot be served.
    """
    fields = _fields(asked) | {"model": host.name}
    if fields.pop("n", 1) != 1:  # Dynamo ends a request with the first choice that ends
        raise RequestError("n > 1 is not supported", hint=f"Ask once for each; {ELSEWHERE}", param="n")
    if "prompt_logprobs" in fields:
        raise RequestError("echo and prompt_logprobs are not supported", hint=ELSEWHERE, param="echo")
    if "max_tokens" not in fields and host.chat:  # the frontend does not tell which route was asked
        fields["max_tokens"] = host.defaults.get("max_new_tokens", max(host.length - len(fields["prompt"][0]), 1))
    (request,) = calls_of_completion(host, parse(msgspec.json.encode(fields), Completion)).requests
    return request


def _fields(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked, by the names that /v1/completions has for it. Raises RequestError for what is no group."""
    given = {name: value for name, value in asked.items() if not (value is None or name in OTHERS)}
    fields: dict[str, Any] = {"prompt": [given.pop("token_ids")]}
    for name in GROUPS:
        for field, value in (given.pop(name, None) or {}).items():
            if value is not None and field not in FRONTEND:
                fields[field] = shortest(value) if isinstance(value, float) else value
    if given:
        raise RequestError(f"{min(given)} is not supported", hint="Leave it out.", param=min(given))
    if (guided := fields.pop("guided_decoding", None)) is not None:
        fields["structured_outputs"] = _form(guided)
    return fields | {"stop_token_ids": [token for name in ENDS for token in fields.pop(name, ())]}


def _form(guided: Mapping[str, Any]) -> dict[str, Any]:
    """As `structured_outputs` says it."""
    form = {name: value for name, value in guided.items() if value is not None}
    if choice := form.pop("choice", None):
        form["grammar"] = "start: " + " | ".join(msgspec.json.encode(each).decode() for each in choice)
    return form


class Answered:
    """The answer to one request, for the event loop in which this is made. Raises as `Host.submit`."""

    def __init__(self, host: Host, request: Request) -> None:
        self._host, self._changed = host, asyncio.Event()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(self._changed.set)

        self._handle = host.submit(request, notify)

    def cancel(self) -> None:
        """It ends with the next step."""
        self._handle.cancel()
        self._host.wake()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """What comes of it, the last with why it ended. Raises why it failed."""
        chunk: dict[str, Any] = {}
        while "finish_reason" not in chunk:
            await self._changed.wait()
            self._changed.clear()
            if events := self._handle.take():
                yield (chunk := chunk_of(events, self._host.text))


def chunk_of(events: Sequence[Event], text: Tokenizer) -> dict[str, Any]:
    """Some events, as Dynamo tells them. Raises why an answer failed."""
    tokens = [event for event in events if isinstance(event, Token)]
    chunk: dict[str, Any] = {"index": 0, "token_ids": [token.id for token in tokens]}
    if told := [token.logprobs for token in tokens if token.logprobs]:
        chunk["log_probs"] = [each.own for each in told]
        chunk["top_logprobs"] = [_likeliest(each, text) for each in told]
    if isinstance(last := events[-1], Failed):
        raise last.cause
    if not isinstance(last, Token):
        chunk["finish_reason"] = last.reason
    return chunk


def _likeliest(told: Logprobs, text: Tokenizer) -> list[dict[str, Any]]:
    names = [(named(text, token), token, value) for token, value in told.top]
    return [
        {"rank": rank, "token_id": token, "token": name, "bytes": raw, "logprob": value}
        for rank, ((name, raw), token, value) in enumerate(names, 1)
    ]
