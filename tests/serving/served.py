"""A server in a process of its own, and raw requests to it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.printed import held

SECONDS = 60


class Served:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, key: str = "none") -> None:
        self.process, self.url = process, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=SECONDS)
        self.http = httpx.Client(base_url=url, timeout=SECONDS)
        self.port = int(url.rpartition(":")[2])

    def metric(self, name: str) -> float:
        """The number of a metric of the first model."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"fope_export_{name}{{"))

    def until(self, name: str, value: float) -> None:
        """Wait for a metric."""
        for _ in range(SECONDS * 20):
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} is {self.metric(name)}")

    def ask(self, body: Any, path: str = "/v1/completions") -> httpx.Response:
        """A POST of JSON."""
        return self.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})

    def raw(self, sent: bytes) -> bytes:
        """What comes back for bytes on a connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            connection.sendall(sent)
            received = connection.recv(1 << 16)
            while b"}" not in received and (more := connection.recv(1 << 16)):
                received += more
            return received

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextmanager
def served(bundles: Sequence[Path], *options: str, key: str = "none") -> Iterator[Served]:
    """A server on a free port of this machine alone; ended at the end."""
    command = [sys.executable, "-m", "fope_export", "serve", *map(str, bundles), "--port", "0", "--json", *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            running = Served(process, held("serve", process.stdout.readline())["url"], key)
            with running.http, running.client:
                yield running
        finally:
            process.kill()
