"""The server as a process: keys, several bundles, signals, and the end."""

import json
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

from fope_export.bundle import Bundle
from fope_export.cli import main
from tests.serving.served import served

LONG = {"model": "model", "prompt": "a", "max_tokens": 1000, "temperature": 0, "ignore_eos": True, "stream": True}


def test_a_key_guards_everything_but_health(asked: Bundle, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("geheimnißvoll\n", encoding="utf-8")
    with served([asked.path], "--unvalidated", "--api-key-file", str(tmp_path / "key")) as server:
        right = {"Authorization": "bearer geheimnißvoll".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=right).json()["data"][0]["id"] == "model"  # type: ignore[arg-type]
        for path in ("/v1/models", "/metrics"):
            answer = server.http.get(path)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert server.http.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert server.http.get("/health/live").status_code == server.http.get("/health/ready").status_code == 200


def test_a_request_chooses_among_bundles(asked: Bundle, rope_bundle: Bundle) -> None:
    names = ["--served-model-name", "fope", "rope"]
    with served([asked.path, rope_bundle.path], "--unvalidated", *names) as server:
        assert [model.id for model in server.client.models.list().data] == ["fope", "rope"]
        texts = {
            name: server.client.completions.create(model=name, prompt="def ", temperature=0, max_tokens=20)
            for name in ("fope", "rope")
        }
        assert texts["fope"].choices[0].text != texts["rope"].choices[0].text


def test_sigterm_lets_running_answers_finish(asked: Bundle) -> None:
    with served([asked.path], "--unvalidated") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream(
            "POST", "/v1/completions", json=LONG | {"stream_options": {"include_usage": True}}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            assert server.http.get("/health/ready").status_code == 503
            assert server.ask(LONG).status_code == 503
            rest = [*lines]
        assert rest[-2] == "data: [DONE]"
        assert json.loads(rest[-4].removeprefix("data: "))["usage"]["completion_tokens"] == LONG["max_tokens"]
        assert server.process.wait(20) == 0


def test_what_does_not_finish_in_time_does_not_look_whole(asked: Bundle) -> None:
    with served([asked.path], "--unvalidated", "--drain", "0") as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-1] and "data: [DONE]" not in rest
        assert server.process.wait(20) == 0


def test_a_second_signal_ends_at_once(asked: Bundle) -> None:
    with served([asked.path], "--unvalidated") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"n": 60}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            rest = list[str]()
            with suppress(httpx.RemoteProtocolError):
                rest += lines
            assert "data: [DONE]" not in rest
        assert server.process.wait(20) == 0


def test_nothing_needs_cleaning_after_a_kill(asked: Bundle) -> None:
    """Not even where it is killed in the middle of an answer, and begins again at the same port."""
    port = "0"
    for _ in range(2):
        with served([asked.path], "--unvalidated", "--port", port) as server:
            assert server.client.completions.create(model="model", prompt="a", max_tokens=1).usage
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
                next(answer.iter_lines())
                server.process.kill()
                server.process.wait(20)
            port = str(server.port)


def test_slow_clients_block_nobody(asked: Bundle) -> None:
    with served([asked.path], "--unvalidated") as server:
        slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
        try:
            for connection in slow:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            assert server.client.completions.create(model="model", prompt="a", max_tokens=2).usage
        finally:
            for connection in slow:
                connection.close()


def test_bad_arguments(asked: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for options, message in (
        (["--served-model-name", "a", "b"], "1 bundles are called a, b"),
        (["--api-key-file", str(tmp_path / "empty")], "holds no key"),
        (["--host", "192.0.2.1"], "cannot be listened to"),
        (["--host", "a" * 80], "cannot be listened to"),
        (["--unvalidated", "--backend", "abacus"], "there is no backend 'abacus'"),
    ):
        assert main(["serve", str(asked.path), "--port", "0", *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not [thread for thread in threading.enumerate() if "engine" in thread.name]
    for option in ("--port=70000", "--drain=nan", "--drain=-1", "--slots=0", "--max-model-len=0"):
        assert main(["serve", str(asked.path), option]) == 2


def test_an_unknown_model_is_an_error_of_the_client(asked: Bundle) -> None:
    with served([asked.path], "--unvalidated") as server, pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="x", prompt="a")
