"""Clients of a server, in a process of their own: a load a line of JSON in, what came of it out. Standard library only.

A load has `port`, `path`, `bodies` (one for each request; one with `after` waits so many seconds), and `lanes`:
connections that take them in turn, each when its last one is answered. Times are time.monotonic()'s, which all
processes of a machine share.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

SECONDS = 300.0
"""For a whole load."""


class Connection:
    """One that is kept alive."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A POST: its status, when it began and ended, and when each part of the answer came."""
        await asyncio.sleep(body.pop("after", 0))
        began, sent = time.monotonic(), json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        status = int((await self._reader.readline()).split()[1])
        fields = {}
        while line := (await self._reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            fields[name.lower()] = value.strip()
        times, parts = list[float](), list[bytes]()
        async for part in self._parts(fields):
            times.append(time.monotonic())
            parts.append(part)
        answer = b"".join(parts)
        return {
            "status": status, "began": began, "times": times, "ended": time.monotonic(), "answer": answer.decode()
        }  # fmt: skip

    async def _parts(self, fields: dict[str, str]) -> AsyncIterator[bytes]:
        if "content-length" in fields:
            yield await self._reader.readexactly(int(fields["content-length"]))
            return
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()


async def load(port: int, path: str, bodies: list[dict[str, Any]], lanes: int) -> list[dict[str, Any]]:
    """What came of each request; one that got no answer has its failure for a status."""
    answers: list[dict[str, Any]] = [{} for _ in bodies]
    waiting: Iterator[tuple[int, dict[str, Any]]] = iter(enumerate(bodies))

    async def lane() -> None:
        async with Connection(port) as connection:
            for number, body in waiting:
                answers[number] = {"status": "no answer"}
                answers[number] = await connection.ask(path, body)

    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(lane() for _ in range(lanes)), return_exceptions=True)
    return answers


def main() -> None:
    for line in sys.stdin:
        asked, cpu = json.loads(line), time.process_time()
        began = time.monotonic()
        answers = asyncio.run(load(asked["port"], asked["path"], asked["bodies"], asked["lanes"]))
        told = {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "answers": answers}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
