"""The server's routes: OpenAI's, and what operators ask for. An ASGI application, which any ASGI server runs."""

import asyncio
import hmac
import json
import logging
import secrets
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fope_export.errors import BusyError, ConfigError, FopeError
from fope_export.serving import protocol
from fope_export.serving.calls import Call, calls_of_chat, calls_of_completion
from fope_export.serving.host import Host, reason_of
from fope_export.serving.metrics import Metrics
from fope_export.serving.openapi import description
from fope_export.serving.protocol import RequestError, parse, refused

BODY = 4 << 20
"""Bytes of a request, at most."""
PATIENCE = 30.0
"""Seconds that a request may take to arrive."""
PAGE = Path(__file__).parent / "page" / "index.html"
POLICY = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page brings all that it needs, and asks nobody but this server."""
RETRY = "1"
"""Seconds after which a full queue is worth another try."""
log = logging.getLogger(__name__)
Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class State:
    """What the routes share."""

    hosts: Mapping[str, Host]
    key: str | None = None
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    open: int = 0
    """Requests for answers that are not answered yet."""

    def host(self, name: str | None) -> Host:
        """Raises RequestError where no bundle has the name; without one it is the first."""
        if name is None:
            return next(iter(self.hosts.values()))
        if name not in self.hosts:
            raise RequestError(
                f"there is no model {name[:100]!r}", hint=f"One of: {', '.join(self.hosts)}.", status=404,
                param="model", code="model_not_found",
            )  # fmt: skip
        return self.hosts[name]


def application(state: State, origins: Sequence[str] = ()) -> Starlette:
    """The server of some hosts. `origins` are pages that browsers may ask from."""
    middleware = [Middleware(CORSMiddleware, allow_origins=[*origins], allow_methods=["*"], allow_headers=["*"])]
    routes = [
        Route("/v1/models", guarded(models), methods=["GET"]),
        Route("/v1/models/{name:path}", guarded(model), methods=["GET"]),
        Route("/v1/completions", guarded(completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
        Route("/tokenize", guarded(tokenize), methods=["POST"]),
        Route("/detokenize", guarded(detokenize), methods=["POST"]),
        Route("/metrics", guarded(metrics), methods=["GET"]),
        Route("/", guarded(page), methods=["GET"]),
        Route("/openapi.json", guarded(openapi), methods=["GET"]),
        Route("/health/live", live, methods=["GET"]),
        Route("/health/ready", ready, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes, middleware=middleware if origins else [],
        exception_handlers={HTTPException: _http_error, Exception: _broken},
    )  # fmt: skip
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def guarded(handler: Handler) -> Handler:
    """Behind the key, with errors as OpenAI's API tells them, and a line in the log."""

    async def guard(request: Request) -> Response:
        began, number = time.monotonic(), request.headers.get("x-request-id", secrets.token_hex(8))[:100]
        request.state.note = {}
        try:
            _check_key(request)
            response = await handler(request)
        except RequestError as cause:
            response = JSONResponse(cause.body, cause.status)
            if cause.status == 401:
                response.headers["WWW-Authenticate"] = 'Basic realm="the API key, as password", charset="UTF-8"'
        except BusyError as cause:
            response = JSONResponse(RequestError(str(cause), status=429).body, 429, {"Retry-After": RETRY})
        except ConfigError as cause:
            response = JSONResponse(refused(cause).body, 400)
        except FopeError as cause:
            response = JSONResponse(RequestError(str(cause), hint=cause.hint, status=503).body, 503)
        except ClientDisconnect:
            response = Response(status_code=499)
        response.headers["X-Request-Id"] = number
        told = {"id": number, "method": request.method, "path": request.url.path, "status": response.status_code}
        log.info(json.dumps(told | {"seconds": round(time.monotonic() - began, 4)} | request.state.note))
        return response

    return guard


def _check_key(request: Request) -> None:
    state: State = request.app.state.server
    if state.key is None:
        return
    if not hmac.compare_digest(_given_key(request), state.key.encode()):
        raise RequestError("the API key is missing or wrong", hint="Send Authorization: Bearer KEY.", status=401,
                           code="invalid_api_key")  # fmt: skip


def _given_key(request: Request) -> bytes:
    """As programs send it, or as browsers do, as a password."""
    kind, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
    if kind.lower() == b"basic":
        try:
            return b64decode(given).partition(b":")[2]
        except ValueError:
            return b""
    return given.strip() if kind.lower() == b"bearer" else b""


async def body_of(request: Request) -> bytes:
    """Raises RequestError for a body that is of another type, too long, or does not arrive."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type is {kind[:60]!r}, expected application/json", status=415)
    received, large = bytearray(), RequestError(f"the body has more than {BODY:,} bytes", status=413)
    if int(request.headers.get("content-length", 0)) > BODY:
        raise large
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                received += part
                if len(received) > BODY:
                    raise large
    except TimeoutError as cause:
        raise RequestError(f"the body did not arrive within {PATIENCE:.0f} s", status=408) from cause
    return bytes(received)


async def models(request: Request) -> Response:
    """Those that may be asked."""
    state: State = request.app.state.server
    return JSONResponse({"object": "list", "data": [_described(host) for host in state.hosts.values()]})


async def model(request: Request) -> Response:
    """One of them."""
    state: State = request.app.state.server
    return JSONResponse(_described(state.host(request.path_params["name"])))


def _described(host: Host) -> dict[str, Any]:
    return {
        "id": host.name, "object": "model", "created": host.created, "owned_by": "fope-export",
        "max_model_len": host.length,
    }  # fmt: skip


async def completions(request: Request) -> Response:
    """/v1/completions."""
    return await _answer(request, protocol.Completion, calls_of_completion)


async def chat(request: Request) -> Response:
    """/v1/chat/completions."""
    return await _answer(request, protocol.Chat, calls_of_chat)


A = TypeVar("A", bound=protocol.Asked)


async def _answer(request: Request, kind: type[A], calls_of: Callable[[Host, A], Call]) -> Response:
    state: State = request.app.state.server
    body = await body_of(request)
    if state.draining:
        raise RequestError("the server is shutting down", status=503)
    state.open += 1
    streamed = False
    try:
        asked, call = await asyncio.to_thread(_understood, state, body, kind, calls_of)
        call.submit(asyncio.get_running_loop())
        request.state.note |= {"model": call.host.name, "prompt_tokens": call.prompt_tokens}
        if streamed := asked.stream:
            return _Stream(request, state, call)
        return await _whole(request, state, call)
    finally:
        state.open -= not streamed


def _understood(state: State, body: bytes, kind: type[A], calls_of: Callable[[Host, A], Call]) -> tuple[A, Call]:
    """Tokenizers, templates and grammars may take long, and the loop does not wait for them."""
    asked = parse(body, kind)
    return asked, calls_of(state.host(asked.model), asked)


async def _whole(request: Request, state: State, call: Call) -> Response:
    try:
        await _until_whole(request, state, call)
    finally:
        _end(request, state, call)
    if call.failure:
        raise RequestError(reason_of(call.failure), status=503 if state.draining else 500)
    return Response(msgspec.json.encode(call.whole()), media_type="application/json")


async def _until_whole(request: Request, state: State, call: Call) -> None:
    """Raises ClientDisconnect when nobody waits any more."""
    gone = _disconnected(request, call)
    try:
        while not call.over:
            await call.changed.wait()
            if gone.done():
                raise ClientDisconnect
            call.changed.clear()
            for _ in call.take():
                state.metrics.token(call)
    finally:
        gone.cancel()


def _disconnected(request: Request, call: Call) -> "asyncio.Task[None]":
    """Done when nobody is there any more; then the call is woken."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(wait())
    gone.add_done_callback(lambda _: call.changed.set())
    return gone


class _Stream(StreamingResponse):
    """An answer in pieces. It ends the call, even where nobody takes a first one."""

    def __init__(self, request: Request, state: State, call: Call) -> None:
        events = _events(request, state, call)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._asked, self._state, self._answered = request, state, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _end(self._asked, self._state, self._answered)
            self._state.open -= 1


async def _events(request: Request, state: State, call: Call) -> AsyncIterator[bytes]:
    """Server-sent events, the last of which is [DONE]; a stream that ends without it is not whole."""
    gone = _disconnected(request, call)
    try:
        while not call.over:
            await call.changed.wait()
            if gone.done():
                return
            call.changed.clear()
            for chunk in call.take():
                state.metrics.token(call)
                yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        if call.failure:
            yield b"data: " + json.dumps(RequestError(reason_of(call.failure), status=500).body).encode() + b"\n\n"
            return
        if call.asked.tells_usage:
            yield b"data: " + msgspec.json.encode(call.chunk([], usage=call.usage)) + b"\n\n"
        yield b"data: [DONE]\n\n"
    finally:
        gone.cancel()


def _end(request: Request, state: State, call: Call) -> None:
    call.cancel()
    state.metrics.end(call)
    request.state.note["completion_tokens"] = call.completion_tokens


async def tokenize(request: Request) -> Response:
    """Text to tokens."""
    state: State = request.app.state.server
    asked = parse(await body_of(request), protocol.Tokenize)
    host = state.host(asked.model)
    tokens = await asyncio.to_thread(host.text.encode, asked.prompt, special=asked.add_special_tokens)
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": host.length})


async def detokenize(request: Request) -> Response:
    """Tokens to text."""
    state: State = request.app.state.server
    asked = parse(await body_of(request), protocol.Detokenize)
    host = state.host(asked.model)
    if outside := [token for token in asked.tokens if token >= host.model.vocab_size]:
        raise RequestError(f"token {outside[0]} is outside the vocabulary of {host.model.vocab_size}", param="tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(host.text.decode, asked.tokens)})


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    state: State = request.app.state.server
    return PlainTextResponse(state.metrics.page(state.hosts.values()), media_type="text/plain; version=0.0.4")


async def page(_: Request) -> Response:
    """For people."""
    return HTMLResponse(PAGE.read_bytes(), headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})


async def openapi(request: Request) -> Response:
    """What may be asked, for programs."""
    state: State = request.app.state.server
    return JSONResponse(description(version("fope-export"), state.hosts))


async def live(request: Request) -> Response:
    """Whether every engine's heart beats."""
    state: State = request.app.state.server
    dead = [host.name for host in state.hosts.values() if not host.alive]
    return JSONResponse({"status": "dead" if dead else "alive", "dead": dead}, 503 if dead else 200)


async def ready(request: Request) -> Response:
    """Whether a request would be answered."""
    state: State = request.app.state.server
    unready = [host.name for host in state.hosts.values() if not host.ready]
    status = "draining" if state.draining else "not ready" if unready else "ready"
    return JSONResponse({"status": status, "unready": unready}, 200 if status == "ready" else 503)


async def _http_error(request: Request, cause: Exception) -> Response:
    assert isinstance(cause, HTTPException)
    error = RequestError(f"{request.method} {request.url.path[:200]}: {cause.detail}", status=cause.status_code)
    return JSONResponse(error.body, cause.status_code, cause.headers)


async def _broken(request: Request, cause: Exception) -> Response:
    log.error("%s failed", request.url.path, exc_info=cause)
    return JSONResponse(RequestError("the server failed; its log says where", status=500).body, 500)
