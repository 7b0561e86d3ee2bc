"""A real Dynamo with two workers around our engine: what it answers, also where a worker is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.lone import Lone
from tests.deploy.servers import (
    BIN,
    LOOPBACK,
    SECONDS,
    Started,
    addresses,
    all_streams,
    environment_of,
    free_port,
    running,
    started,
    until,
)

pytestmark = pytest.mark.skipif(not find_spec("dynamo"), reason="needs scripts/venv dynamo")

NEW = 600
STREAMS: list[dict[str, Any]] = [
    {"prompt": f"def f{i}(", "max_tokens": NEW, "ignore_eos": True, "temperature": 0.9 * (i > 3), "seed": i}
    for i in range(8)
]
ENDLESS: dict[str, Any] = STREAMS[0] | {"max_tokens": 4000, "stream": True}
SHORT: dict[str, Any] = {"prompt": "def f(", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(folder_for: Callable[[str], Path]) -> Path:
    return folder_for("dynamo")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Started]:
    with started(folder, "--batch-invariant") as server:
        yield server


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Started]:
    """One request at a time, and none waits."""
    with started(folder, "--batch-invariant", "--slots", "1", "--max-queued", "0", WORKERS="1") as server:
        yield server


def workers(server: Started) -> list[int]:
    return [pid for pid in server.children() if b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def instances(server: Started) -> int:
    """As many workers as the frontend knows."""
    return len(httpx.get(f"{server.url}/health").json()["instances"])


def migrations(server: Started) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "migration_total{" in line)


def chosen(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_it_answers_as_the_bundle_does(server: Started, lone: Lone) -> None:
    assert server.check().returncode == 0 and len(workers(server)) == 2
    assert chosen(server.ask(**SHORT)) == lone.says(SHORT)


def test_it_listens_to_this_machine_alone(server: Started) -> None:
    assert addresses(server.children()) == {LOOPBACK}


def test_no_stream_is_lost_with_a_worker(server: Started, lone: Lone, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = all_streams(server, STREAMS)
    before, (killed, _) = migrations(server), workers(server)
    disturbed = all_streams(server, STREAMS, lambda: os.kill(killed, signal.SIGKILL))
    assert migrations(server) - before == 4
    prompts = [len(lone.text.encode(body["prompt"])) for body in STREAMS]
    for told in (undisturbed, disturbed):
        assert [(each.whole, each.reason) for each in told] == [(True, "length")] * 8
        counts = [(each.usage["prompt_tokens"], each.usage["completion_tokens"]) for each in told if each.usage]
        assert counts == [(prompt, NEW) for prompt in prompts]
    assert not lone.ties(STREAMS, [each.text for each in undisturbed])
    if ties := lone.ties(STREAMS, [each.text for each in disturbed]):
        with capsys.disabled():
            sys.stdout.write(f"near-ties after a migration: {'; '.join(ties)}\n")
    until(lambda: killed not in workers(server) and len(workers(server)) == 2)
    until(lambda: instances(server) == 2)  # until then, what cannot migrate may be sent to the one that is lost
    assert [chosen(server.ask(**SHORT)) for _ in range(8)] == [lone.says(SHORT)] * 8


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 2, "temperature": 0.5}, "n > 1"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"guided_regex": "["}, "regex cannot be followed"),
        ({"max_tokens": 5000}, "6 tokens and the answer may have 5,000, and 4,096 fit"),
    ],
    ids=("n", "echo", "best_of", "regex", "length"),
)
def test_what_cannot_be_served_is_refused_by_name(server: Started, fields: dict[str, Any], named: str) -> None:
    answer = server.ask(**SHORT | fields)
    assert answer.status_code == 400 and named in answer.json()["message"]


def test_answers_have_the_form_that_is_asked_for(server: Started) -> None:
    assert chosen(server.ask(**SHORT, guided_regex="[0-9]{3}")).isdigit()
    assert chosen(server.ask(**SHORT, guided_choice=["yes", "nö"])) in ("yes", "nö")
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    assert json.loads(chosen(server.ask(**SHORT, guided_json=schema))) == {"a": 7}


def test_answers_end_where_they_are_told_to(server: Started, lone: Lone) -> None:
    text = lone.says(SHORT)
    stop, last = text[5:8], lone.text.encode(text[6])
    assert chosen(server.ask(**SHORT, stop=[stop])) == text[:5]
    assert chosen(server.ask(**SHORT, stop_token_ids=last)) == text[: text.index(text[6])]


def test_probabilities_are_the_model_s(server: Started, lone: Lone) -> None:
    told = server.ask(**SHORT, logprobs=2).json()["choices"][0]["logprobs"]
    ours = lone.logprobs(SHORT, 2)
    assert told["token_logprobs"] == pytest.approx([each.own for each in ours], rel=1e-6)
    tops = [[value for _, value in each.top] for each in ours]
    assert [[*top.values()] for top in told["top_logprobs"]] == [pytest.approx(top, rel=1e-6) for top in tops]


def test_what_a_worker_refuses_ends_all(folder: Path) -> None:
    environment = environment_of(PORT=str(free_port()))
    for options in (["--slots", "none"], ["--backend", "none"]):
        ended = subprocess.run([folder / "start", *options], env=environment, capture_output=True, timeout=SECONDS)
        assert ended.returncode == 2 and b"none" in ended.stderr


def test_a_disconnect_frees_the_slot(tiny: Started, lone: Lone) -> None:
    with httpx.stream("POST", f"{tiny.url}/v1/completions", json=ENDLESS | {"model": tiny.model}) as running:
        lines = running.iter_lines()  # whose end is the connection's
        assert next(lines).startswith("data: {")
        assert tiny.ask(**SHORT).status_code == 429
    until(lambda: tiny.ask(**SHORT).status_code == 200)
    assert chosen(tiny.ask(**SHORT)) == lone.says(SHORT)


def test_at_sigterm_answers_are_finished(tiny: Started, lone: Lone) -> None:
    (told,) = all_streams(tiny, STREAMS[:1], lambda: tiny.process.send_signal(signal.SIGTERM))
    assert told.whole and told.text == lone.says(STREAMS[0])
    assert tiny.process.wait(SECONDS) == 0


def test_machines_find_each_other(folder: Path) -> None:
    """The frontend and each worker are started apart, and meet in etcd and NATS."""
    with stores(folder) as (etcd, nats):
        settings = {
            "DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd, "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "DYN_REQUEST_PLANE": "nats", "DYN_EVENT_PLANE": "nats", "NATS_SERVER": nats, "WORKERS": "1",
        }  # fmt: skip
        with (
            running([folder / "start", "worker"], environment_of(**settings)),
            running([folder / "start", "worker"], environment_of(**settings)),
            started(folder, "frontend", **settings) as server,
        ):
            until(lambda: instances(server) == 2)
            assert server.check().returncode == 0
            assert addresses(server.children()) == {LOOPBACK}


@contextmanager
def stores(folder: Path) -> Iterator[tuple[str, str]]:
    """etcd and NATS."""
    client, peer, nats = free_port(), free_port(), free_port()
    etcd = f"http://127.0.0.1:{client}"
    listening = ("--listen-client-urls", etcd, "--advertise-client-urls", etcd)
    peers = ("--listen-peer-urls", f"http://127.0.0.1:{peer}", "--data-dir", str(folder / "etcd"))
    with (
        running([BIN / "etcd", *listening, *peers], environment_of()),
        running([BIN / "nats-server", "-a", "127.0.0.1", "-p", str(nats)], environment_of()),
    ):
        yield etcd, f"nats://127.0.0.1:{nats}"
