"""A real Ray Serve with two replicas of our server, in a network of its own, also where one is killed."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from tests.deploy.lone import Lone
from tests.deploy.servers import BIN, SECONDS, Started, all_streams, answers, environment_of, running, started, until

NETWORKS = [name for _, name in socket.if_nameindex()]
pytestmark = [
    pytest.mark.skipif(not find_spec("ray"), reason="needs scripts/venv ray"),
    pytest.mark.skipif(
        NETWORKS != ["lo"], reason="needs scripts/venv ray, and scripts/alone.py: Ray listens everywhere"
    ),
]

NEW = 800
DASHBOARD = 8265
STREAMS: list[dict[str, Any]] = [
    {"prompt": f"def f{i}(", "max_tokens": NEW, "ignore_eos": True, "temperature": 0.9 * (i > 3), "seed": i}
    for i in range(8)
]
SHORT: dict[str, Any] = {"prompt": "def f(", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(folder_for: Callable[[str], Path]) -> Path:
    return folder_for("ray")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Started]:
    with started(folder, "--batch-invariant", "--threads", "1") as server:
        yield server


def replicas(server: Started) -> list[int]:
    """Processes, by how Ray names them."""
    (own,) = [pid for pid in server.children() if b"raylet/raylet" in _command(pid)]
    return [pid for pid in server.children(own) if b"ray::ServeReplica" in _command(pid)]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_it_answers_as_the_bundle_does(server: Started, lone: Lone) -> None:
    assert server.check().returncode == 0 and len(replicas(server)) == 2
    told = all_streams(server, STREAMS)
    assert [each.whole for each in told] == [True] * 8
    assert [each.text for each in told] == [lone.says(body) for body in STREAMS]


def test_streams_end_with_their_replica_and_later_requests_are_answered(server: Started, lone: Lone) -> None:
    """A stream of the replica that is killed ends without finish_reason and [DONE], which is how a client sees that it
    is lost; what was told of it is right. All others are whole.
    """
    killed = replicas(server)[0]
    told = all_streams(server, STREAMS, lambda: os.kill(killed, signal.SIGKILL), in_turn=True)
    later = [server.ask(**SHORT) for _ in range(20)]
    assert [answer.status_code for answer in later] == [200] * 20
    texts = [lone.says(body) for body in STREAMS]
    lost = [each for each in told if not each.whole]
    assert 0 < len(lost) < 8 and not any(each.reason or each.usage for each in lost)
    for each, text in zip(told, texts, strict=True):
        assert each.text == text if each.whole else text.startswith(each.text)
    until(lambda: killed not in replicas(server) and len(replicas(server)) == 2)
    assert server.check().returncode == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_a_replica_without_an_engine_is_unhealthy(server: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("fope_ray", server.folder / "fope_ray.py")
    assert spec and spec.loader
    spec.loader.exec_module(module := module_from_spec(spec))
    check = module.Model.func_or_class.check_health
    asyncio.run(check(SimpleNamespace(_host=SimpleNamespace(ready=True))))
    dead = SimpleNamespace(ready=False, failure=ValueError("broken"))
    with pytest.raises(RuntimeError, match="ValueError"):
        asyncio.run(check(SimpleNamespace(_host=dead)))


def test_at_sigterm_answers_are_finished(server: Started, lone: Lone) -> None:
    body = STREAMS[0] | {"max_tokens": 1500}
    (told,) = all_streams(server, [body], lambda: server.process.send_signal(signal.SIGTERM))
    assert told.whole and told.text == lone.says(body)
    assert server.process.wait(SECONDS) == 0


def test_a_cluster_takes_the_configuration(folder: Path) -> None:
    """`serve deploy`, as it is, on a Ray that was started before, and asks for a token as Ray does by itself."""
    settings = {"PYTHONPATH": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = environment_of(RAY_USAGE_STATS_ENABLED="0", WAIT=str(SECONDS), **settings)
    deploying = [str(BIN / "serve"), "deploy", str(folder / "serve.yaml")]
    with TemporaryDirectory(prefix="ray") as scratch:  # of a short name, as sockets are in it
        head = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--temp-dir", scratch]
        with running(head, environment):
            until(lambda: answers(DASHBOARD))
            subprocess.run(deploying, env=environment, check=True, timeout=SECONDS)
            checked = subprocess.run([folder / "check"], env=environment, capture_output=True, timeout=SECONDS)
            assert checked.returncode == 0, checked.stderr
