"""A real Dynamo with two workers around our engine: what it answers, also where a worker is killed."""

import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.lone import Lone
from tests.deploy.servers import Started, all_streams, started, until

pytestmark = pytest.mark.skipif(not find_spec("dynamo"), reason="needs scripts/venv dynamo")

NEW = 600
STREAMS: list[dict[str, Any]] = [
    {"prompt": f"def f{i}(", "max_tokens": NEW, "ignore_eos": True, "temperature": 0.9 * (i > 3), "seed": i}
    for i in range(8)
]
SHORT: dict[str, Any] = {"prompt": "def f(", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(folder_for: Callable[[str], Path]) -> Path:
    return folder_for("dynamo")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Started]:
    with started(folder, "--batch-invariant") as server:
        yield server


def workers(server: Started) -> list[int]:
    return [pid for pid in server.children() if b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def migrations(server: Started) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "migration_total{" in line)


def test_it_answers_as_the_bundle_does(server: Started, lone: Lone) -> None:
    assert server.check().returncode == 0 and len(workers(server)) == 2
    assert server.ask(**SHORT).json()["choices"][0]["text"] == lone.says(SHORT)


def test_no_stream_is_lost_with_a_worker(server: Started, lone: Lone) -> None:
    undisturbed = all_streams(server, STREAMS)
    before, (killed, _) = migrations(server), workers(server)
    disturbed = all_streams(server, STREAMS, lambda: os.kill(killed, signal.SIGKILL))
    assert migrations(server) - before == 4
    for told in (undisturbed, disturbed):
        assert [(each.whole, each.reason) for each in told] == [(True, "length")] * 8
        prompts = [len(lone.text.encode(body["prompt"])) for body in STREAMS]
        counts = [(each.usage["prompt_tokens"], each.usage["completion_tokens"]) for each in told if each.usage]
        assert counts == [(prompt, NEW) for prompt in prompts]
    assert not lone.ties(STREAMS, [each.text for each in undisturbed])
    print(lone.ties(STREAMS, [each.text for each in disturbed]))
    until(lambda: killed not in workers(server) and len(workers(server)) == 2)
    for _ in range(8):
        assert server.ask(**SHORT).json()["choices"][0]["text"] == lone.says(SHORT)
