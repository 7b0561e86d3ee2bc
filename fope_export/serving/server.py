"""The server as a process: a socket, signals, and the end of it."""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fope_export.errors import ConfigError
from fope_export.serving.app import State, application
from fope_export.serving.protocol import RequestError

log = logging.getLogger(__name__)
HEAD = 64 << 10
"""Bytes of a request before its body, at most."""


class _Server(uvicorn.Server):
    """Whose signals are ours: uvicorn would close its socket at once, and end by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """Whose refusals are JSON too, of what is no HTTP, or has a long head."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._grow(len(name) + len(value))

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._grow(len(url))

    def _grow(self, count: int) -> None:
        """Raises ValueError, which the parser takes for what is no HTTP."""
        self._head += count
        if self._head > HEAD:
            raise ValueError(f"a head has more than {HEAD:,} bytes")

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(RequestError(msg).body).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head.encode() + body)
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one. Raises ConfigError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as cause:
        raise ConfigError(f"{host}:{port} cannot be listened to: {cause}", hint="Choose another --port.") from cause


def address(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    state: State, listening: socket.socket, *, drain: float, origins: Sequence[str] = (),
    told: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Answer until a signal comes; then let running requests finish for `drain` seconds. A second signal ends it at
    once. `told` is called when it answers.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = uvicorn.Config(
        application(state, origins), http=_Protocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    asyncio.run(_serve(_Server(config), state, listening, drain, told))


async def _serve(
    server: _Server, state: State, listening: socket.socket, drain: float, told: Callable[[], None]
) -> None:
    ending = asyncio.Event()

    def end() -> None:
        server.should_exit = server.should_exit or state.draining
        server.force_exit = server.should_exit
        state.draining = True
        ending.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    while not (server.started or running.done()):
        await asyncio.sleep(0.01)
    if server.started:
        told()
    waiting = asyncio.ensure_future(ending.wait())
    await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    until = loop.time() + drain
    while state.open and loop.time() < until and not (server.should_exit or running.done()):
        await asyncio.sleep(0.05)
    for host in state.hosts.values():
        host.stop()
    server.should_exit = True
    await running
