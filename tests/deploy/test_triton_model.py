"""Triton's model without Triton: what a server is told of the engine, and how `start` refuses."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fope_export.deploy.triton_requests import asked
from fope_export.serving.protocol import RequestError
from tests.deploy.lone import Lone
from tests.deploy.servers import until

FINAL = 1
OPTIONS = "--unvalidated --batch-invariant --threads 1 --slots 1 --max-queued 0"


class Sender:
    """Where a request's answer goes. Its client goes away once it has so many pieces."""

    def __init__(self, patience: int = 1 << 30) -> None:
        self.sent: list[Any] = []
        self._over, self._patience = False, patience

    def is_cancelled(self) -> bool:
        return len(self.sent) >= self._patience

    def send(self, response: Any, flags: int) -> None:
        self.sent.append(response)
        self._over = flags == FINAL

    def ended(self) -> bool:
        return self._over


class Asked:
    """A request with some tensors."""

    def __init__(self, sender: Sender, **tensors: Any) -> None:
        self._sender, self._tensors = sender, tensors

    def inputs(self) -> list[Any]:
        return [
            SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: np.array([[value]]))
            for name, value in self._tensors.items()
        ]

    def parameters(self) -> str:
        return "{}"

    def get_response_sender(self) -> Sender:
        return self._sender


class Refusal(Exception):  # noqa: N818
    """TritonModelException."""


def backend_utils() -> ModuleType:
    """What Triton gives to a model, as far as ours uses it."""
    module = ModuleType("triton_python_backend_utils")
    names = {"CANCELLED": "cancelled", "UNAVAILABLE": "unavailable", "INVALID_ARG": "invalid", "INTERNAL": "internal"}
    error = SimpleNamespace(**names)
    vars(module).update(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        TritonModelException=Refusal,
        Tensor=lambda name, value: (name, value.item()),
        InferenceResponse=lambda outputs=(), error=None: SimpleNamespace(error=error, **dict(outputs)),
    )

    class TritonError(SimpleNamespace):
        def __init__(self, message: str, code: str) -> None:
            super().__init__(message=message, code=code)

    for name in names:
        setattr(TritonError, name, getattr(error, name))
    vars(module)["TritonError"] = TritonError
    return module


@pytest.fixture(scope="module")
def folder(folder_for: Callable[[str], Path]) -> Path:
    return folder_for("triton")


@pytest.fixture
def module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """model.py, as Triton imports it."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_utils())
    (path,) = folder.glob("models/*/1/model.py")
    spec = importlib.util.spec_from_file_location("model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(module: Any, options: str = OPTIONS) -> Any:
    model = module.TritonPythonModel()
    config = {"parameters": {"options": {"string_value": options}}}
    model.initialize({"model_name": "small", "model_config": json.dumps(config)})
    return model


@pytest.fixture
def loaded(module: Any) -> Iterator[Any]:
    loaded = made(module)
    yield loaded
    loaded.finalize()


def test_an_answer_is_sent_as_it_comes(loaded: Any, lone: Lone) -> None:
    drawn = {"max_tokens": 20, "temperature": 0.9, "seed": 3}
    for stream in (True, False):
        sender = Sender()
        loaded.execute([Asked(sender, text_input="def f(", stream=stream, **drawn)])
        until(sender.ended)
        assert b"".join(each.text_output for each in sender.sent).decode() == lone.says({"prompt": "def f("} | drawn)
        assert sum(each.num_output_tokens for each in sender.sent) == 20 and (stream or len(sender.sent) == 1)


def test_a_cancelled_answer_ends_within_a_step(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded._host.engine
    step, counts = engine.step, list[tuple[int, int]]()
    sender = Sender(patience=3)

    def counted() -> bool:
        more = bool(step())
        counts.append((len(sender.sent), engine.running))
        time.sleep(0.02)  # the loop, which a slower model leaves as much time, has looked
        return more

    monkeypatch.setattr(engine, "step", counted)
    loaded.execute([Asked(sender, text_input="a", max_tokens=4000, temperature=0.0, ignore_eos=True, stream=True)])
    until(sender.ended)
    until(lambda: not engine.running)
    left = [running for told, running in counts if told >= 3]
    assert left.count(1) <= 2 and sender.sent[-1].error.code == "cancelled"


def test_errors_have_their_kinds(loaded: Any) -> None:
    def refused(**tensors: Any) -> Any:
        sender = Sender()
        loaded.execute([Asked(sender, **tensors)])
        until(sender.ended)
        return sender.sent[-1].error

    wrong = refused(text_input="a", temperature=-1.0)
    assert wrong.code == "invalid" and wrong.message.startswith("temperature: Expected")
    staying = Sender(patience=1 << 20)
    loaded.execute([Asked(staying, text_input="a", max_tokens=4000, temperature=0.0, ignore_eos=True, stream=True)])
    until(lambda: bool(staying.sent))
    busy = refused(text_input="a")
    assert busy.code == "unavailable" and "would wait, and 0 may" in busy.message
    loaded._host.stop()
    until(staying.ended)
    assert "shutting down" in staying.sent[-1].error.message


def test_a_dead_engine_is_not_ready_and_ends_the_process(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ended = made(module), list[int]()

    def end(code: int) -> None:
        ended.append(code)
        loaded._ending = True  # or it is ended again

    def broken() -> bool:
        raise RuntimeError("broken")

    monkeypatch.setattr(module.os, "_exit", end)
    assert loaded.is_ready()
    monkeypatch.setattr(loaded._host.engine, "step", broken)
    monkeypatch.setattr("fope_export.serving.host._probe", lambda engine: broken())
    loaded._host.wake()
    until(lambda: bool(ended))
    assert ended == [module.DEAD] and not loaded.is_ready()
    loaded.finalize()


@pytest.mark.parametrize(
    ("options", "message"), [("--slots 0", "argument --slots: 0 is too few"), ("", "was not validated")]
)
def test_what_is_not_served_is_told_when_it_loads(options: str, message: str, module: Any) -> None:
    with pytest.raises(Refusal, match=message):
        made(module, options)


def test_start_is_connected_to_the_models_process(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "watch")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        monkeypatch.setenv("FOPE_EXPORT_WATCH", path)
        model = made(module)
        with listening.accept()[0] as connection:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
            model.finalize()
            connection.setblocking(True)
            assert connection.recv(1) == b""


def test_numbers_are_what_was_meant() -> None:
    tensors = {"text_input": np.array([[b"a"]], object), "temperature": np.array([[0.7]], np.float32)}
    tensors |= {"seed": np.array([[2**64 - 1]], np.uint64), "stop_words": np.array([[b"x", "ß".encode()]], object)}
    read = asked("m", tensors, {"top_k": 5, "id": "mine"})
    assert (read.temperature, read.seed, read.stops, read.top_k) == (0.7, 2**63 - 1, ("x", "ß"), 5)
    with pytest.raises(RequestError, match="not UTF-8: invalid start byte at byte 1"):
        asked("m", {"text_input": np.array([[b"a\xff"]], object)}, {})
    with pytest.raises(RequestError, match="no parameter or tensor n"):
        asked("m", tensors, {"n": 2})


def start(folder: Path, python: str, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": str(Path(python).parent)} | more
    return subprocess.run([python, folder / "start"], env=environment, capture_output=True, text=True)


def test_start_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    done = start(folder, sys.executable)
    assert done.returncode == 2 and "there is no tritonserver" in done.stderr and "./install" in done.stderr
    home = tmp_path / "pytriton/tritonserver"
    (home / "python_backend_stubs").mkdir(parents=True)
    (home.parent / "__init__.py").touch()
    for more in ({"PYTHONPATH": str(tmp_path)}, {"TRITONSERVER": str(home / "bin/tritonserver")}):
        done = start(folder, sys.executable, **more)
        assert done.returncode == 2 and f"numpy {np.__version__} is there" in done.stderr and "./install" in done.stderr


def test_start_needs_the_package(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    (moved / "start").write_text((folder / "start").read_text().replace(sys.executable, "/nowhere/python"))
    bare = ["-I", "-S"]
    done = subprocess.run([sys.executable, *bare, moved / "start"], env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "has no fope_export" in done.stderr and "[serve]" in done.stderr


def test_start_takes_the_program_that_it_is_told(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    program.chmod(0o755)
    more = {"TRITONSERVER": str(program), "HOST": "127.0.0.9", "PORT": "1", "GRPC_PORT": "2", "METRICS_PORT": "3"}
    done = start(folder, sys.executable, DRAIN="4", **more)
    assert done.returncode == 7, done.stderr
    named = dict(option.removeprefix("--").partition("=")[::2] for option in done.stdout.split())
    assert {name: named[name] for name in ("http-port", "grpc-port", "metrics-port", "exit-timeout-secs")} == {
        "http-port": "1", "grpc-port": "2", "metrics-port": "3", "exit-timeout-secs": "4",
    }  # fmt: skip
    assert {value for name, value in named.items() if name.endswith("-address")} == {"127.0.0.9"}
    assert named["model-repository"] == str(folder / "models")
