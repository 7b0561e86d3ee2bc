"""Servers that a deployed folder's `start` starts, as processes of their own, and streams from them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx

SECONDS = 120
"""That anything may take."""
BIN = Path(sys.executable).parent
LISTENS, LOOPBACK = "0A", "0100007F"
"""A socket's state, and 127.0.0.1, in /proc/net/tcp."""


@dataclass
class Told:
    """What came of a stream."""

    text: str = ""
    reason: str | None = None
    usage: dict[str, int] | None = None
    whole: bool = False
    """Whether [DONE] came; a stream without it is lost."""


class Started:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, environment: dict[str, str], folder: Path) -> None:
        self.process, self.url, self._environment, self.folder = process, url, environment, folder
        self.model = json.loads((folder / "check.json").read_text())["model"]

    def check(self) -> "subprocess.CompletedProcess[str]":
        """What the folder's `check` says."""
        return subprocess.run(
            [self.folder / "check"], env=self._environment, capture_output=True, text=True, timeout=SECONDS
        )

    def ask(self, **body: Any) -> httpx.Response:
        """A completion."""
        return httpx.post(f"{self.url}/v1/completions", json={"model": self.model, **body}, timeout=SECONDS)

    def stream(self, each: Callable[[Told], object] = lambda told: None, **body: Any) -> Told:
        """The same in pieces; `each` is called for every one. It ends early where the connection does."""
        asked = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        told = Told()
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=asked, timeout=SECONDS) as answer:
                assert answer.status_code == 200, answer.read()
                for line in answer.iter_lines():
                    _follow(told, line)
                    each(told)
        except httpx.TransportError:
            pass
        return told

    def children(self, of: int | None = None) -> list[int]:
        """Processes that one started, by default `start` itself."""
        pid = self.process.pid if of is None else of
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


def _follow(told: Told, line: str) -> None:
    if line == "data: [DONE]":
        told.whole = True
    elif line.startswith("data: {"):
        chunk = json.loads(line.removeprefix("data: "))
        told.usage = chunk.get("usage") or told.usage
        for choice in chunk["choices"]:
            told.text += choice["text"]
            told.reason = choice.get("finish_reason") or told.reason


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def environment_of(**more: str) -> dict[str, str]:
    """For a program that finds this Python first."""
    return os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **more}


@contextmanager
def started(folder: Path, *options: str, **more: str) -> Iterator[Started]:
    """What `start` starts, once it is ready. It ends with the block, and with the process that was started here."""
    port = free_port()
    environment = environment_of(PORT=str(port), WAIT=str(SECONDS), **more)
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([folder / "start", *options], env=environment, stdout=log, stderr=log) as process,
    ):
        server = Started(process, f"http://127.0.0.1:{port}", environment, folder)
        try:
            checked = server.check()
            assert checked.returncode == 0, f"{checked.stderr}\n{(folder / 'log').read_text()[-4000:]}"
            yield server
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def running(command: Sequence[str | Path], environment: dict[str, str]) -> Iterator[None]:
    """A program until the end of the block."""
    none = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=none, stderr=none) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(SECONDS)


def all_streams(
    server: Started, bodies: Sequence[dict[str, Any]], meanwhile: Callable[[], object] = lambda: None, *,
    in_turn: bool = False,
) -> list[Told]:  # fmt: skip
    """Streams at once, or each begun when the one before has; when all have, `meanwhile` something happens."""
    begun = [Event() for _ in bodies]

    def one(index: int) -> Told:
        def each(told: Told) -> None:
            if told.text:
                begun[index].set()

        try:
            return server.stream(each, **bodies[index])
        finally:
            begun[index].set()

    with ThreadPoolExecutor(len(bodies)) as pool:
        streams = []
        for index, event in enumerate(begun):
            streams.append(pool.submit(one, index))
            assert not in_turn or event.wait(SECONDS)
        assert all(event.wait(SECONDS) for event in begun)
        meanwhile()
        return [each.result() for each in streams]


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def addresses(pids: Sequence[int]) -> set[str]:
    """Where processes listen, as /proc writes it."""
    links = [link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {str(link.readlink()).removeprefix("socket:[").removesuffix("]") for link in links if link.is_symlink()}
    lines = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return {fields[1].partition(":")[0] for fields in lines if fields[3] == LISTENS and fields[9] in inodes}


def until(condition: Callable[[], bool]) -> None:
    """Raises AssertionError if it does not come."""
    for _ in range(SECONDS * 20):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never comes")
