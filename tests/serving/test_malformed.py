"""A hundred requests that mean ill, or are broken: a hundred clean refusals, and the server answers as before."""

import gzip
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from tests.serving.served import SECONDS, Served

RIGHT: dict[str, Any] = {"model": "model", "prompt": "a", "max_tokens": 2, "temperature": 0}
COUNT = 100
LARGE = 10 << 20


def cut_short() -> Iterator[bytes]:
    """JSON that ends too early, at 20 places."""
    whole = json.dumps(RIGHT).encode()
    yield from (request(whole[: i * len(whole) // 20]) for i in range(20))


def of_wrong_types() -> Iterator[bytes]:
    """Right but for one field, 45 times."""
    numbers = ("temperature", "top_p", "top_k", "min_p", "n", "max_tokens", "seed", "presence_penalty", "min_tokens")
    for name in numbers:
        for value in ("1", [1], {"a": 1}, 1e400):
            yield request(json.dumps(RIGHT | {name: value}).encode())
    for name in (
        "prompt",
        "model",
        "stream",
        "stop",
        "logit_bias",
        "echo",
        "logprobs",
        "response_format",
        "stream_options",
    ):
        yield request(json.dumps(RIGHT | {name: 1.5}).encode())


def of_wrong_encodings() -> Iterator[bytes]:
    """JSON in what is not UTF-8, and what is not JSON."""
    text = json.dumps(RIGHT | {"prompt": "é"}, ensure_ascii=False)
    for encoding in ("utf-16", "utf-16-be", "utf-32", "latin-1"):
        yield request(text.encode(encoding))
    yield request(gzip.compress(text.encode()), "Content-Encoding: gzip")
    yield request(b"\xff\xfe\xfd")
    yield request(b'{"model": "model", "prompt": "\xed\xa0\x80"}')
    yield request(json.dumps(RIGHT | {"prompt": "\ud800"}).encode())
    yield request(b"\0" * 100)
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
    ):
        yield request(text.encode(), kind=kind)


def of_wrong_sizes() -> Iterator[bytes]:
    """Ten megabytes in several ways, deep ones, long heads, and lengths that are none."""
    for start, unit, end in (
        (b'{"prompt": "', b"a", b'"}'),
        (b"", b" ", b"{}"),
        (b"[", b"0,", b"0]"),
        (b"", b"[", b""),
    ):
        yield request(start + unit * (LARGE // len(unit)) + end)
    yield request(b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}")
    yield request(json.dumps(RIGHT | {"prompt": [0] * 20_000}).encode())
    yield request(json.dumps(RIGHT | {f"field{i}": i for i in range(20_000)}).encode())
    yield request(b"{}", f"X-Long: {'a' * 100_000}")
    yield b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    for length in ("-1", "ten", "1e3", "0x10"):
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        yield f"{head}Content-Length: {length}\r\n\r\n{{}}".encode()


def request(body: bytes, *heads: str, kind: str = "application/json") -> bytes:
    head = ["POST /v1/completions HTTP/1.1", "Host: x", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *heads]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def refusal(server: Served, sent: bytes) -> int:
    """The status of what comes back, which is an error as OpenAI tells it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it need not read to the end before it refuses
            connection.sendall(sent)
        received = b""
        while (part := connection.recv(1 << 16)) and not _whole(received := received + part):
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    assert json.loads(body)["error"].keys() >= {"message", "type", "param", "code"}, received
    return int(head.split()[1])


def _whole(received: bytes) -> bool:
    head, found, body = received.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length")]
    return bool(found and lengths) and len(body) >= int(lengths[0])


@pytest.mark.whole
def test_a_hundred_malformed_requests(server: Served) -> None:
    wrong = [*cut_short(), *of_wrong_types(), *of_wrong_encodings(), *of_wrong_sizes()]
    slow = [request(b" " * 100)[:-number] for number in range(1, COUNT - len(wrong) + 1)]  # the rest never comes
    with ThreadPoolExecutor(len(slow)) as pool:
        waiting = [pool.submit(refusal, server, sent) for sent in slow]
        statuses = [refusal(server, sent) for sent in wrong]
        assert server.ask(RIGHT).json()["choices"][0]["text"]
        late = [each.result() for each in waiting]
    assert len(slow) > 5 and late == [408] * len(slow)
    assert len(statuses) + len(late) == COUNT and all(400 <= status < 500 for status in statuses), statuses
    assert server.http.get("/health/ready").status_code == 200 and server.process.poll() is None
