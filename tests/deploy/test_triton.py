"""A real Triton with our engine, in the environment of `scripts/venv triton` that FOPE_EXPORT_TRITON names."""

import json
import os
import signal
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import numpy as np
import pytest

from fope_export.bundle import Bundle
from tests.deploy.lone import Lone
from tests.deploy.servers import LOOPBACK, SECONDS, Started, addresses, free_port, started, until

FOLDER = os.environ.get("FOPE_EXPORT_TRITON")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs scripts/venv triton")
ENVIRONMENT = Path(FOLDER or "").resolve()

MAPPED = f"{'0' * 16}FFFF0000{LOOPBACK}"
"""127.0.0.1 as an address of IPv6."""
GREEDY: dict[str, Any] = {"prompt": "def read(", "max_tokens": 40, "temperature": 0.0}
DRAWN: dict[str, Any] = GREEDY | {"temperature": 0.7, "seed": 5}
LONG: dict[str, Any] = {"text_input": "a", "max_tokens": 4000, "temperature": 0.0, "ignore_eos": True, "stream": True}
OPTIONS = "--unvalidated --batch-invariant --threads 1 --slots 2 --max-queued 1"
FLAGS = ("stream", "ignore_eos", "return_num_input_tokens", "return_num_output_tokens")
DTYPES: dict[str, Any] = {
    "text_input": np.object_, "max_tokens": np.int32, "seed": np.uint64, "temperature": np.float32,
    **dict.fromkeys(FLAGS, np.bool_),
}  # fmt: skip


class Triton(Started):
    """A running one."""

    @property
    def path(self) -> str:
        return f"{self.url}/v2/models/{self.model}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self._environment['GRPC_PORT']}"

    @property
    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def generate(self, **body: Any) -> httpx.Response:
        """An answer as a whole."""
        return httpx.post(f"{self.path}/generate", json=body, timeout=SECONDS)

    @contextmanager
    def events(self, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """An answer in pieces."""
        with httpx.stream("POST", f"{self.path}/generate_stream", json=body, timeout=SECONDS) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines())
            yield (json.loads(line) for line in lines if line)

    def stub(self) -> int:
        """The process that the model runs in."""
        (server,) = self.children()
        threads = Path(f"/proc/{server}/task").iterdir()
        (stub,) = [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]
        return stub


@contextmanager
def triton(folder: Path) -> Iterator[Triton]:
    ports = {name: str(free_port()) for name in ("GRPC_PORT", "METRICS_PORT")}
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with started(folder, PATH=path, **ports) as server:
        yield Triton(server.process, server.url, server._environment, folder)


@pytest.fixture(scope="module")
def folder(folder_for: Callable[[str], Path]) -> Path:
    folder = folder_for("triton")
    (config,) = folder.glob("models/*/config.pbtxt")
    config.write_text(config.read_text().replace('"--unvalidated"', f'"{OPTIONS}"'))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Triton]:
    with triton(folder) as server:
        yield server


@pytest.fixture(scope="module")
def client() -> Any:
    """The module of Triton's own gRPC client, which is in its environment alone."""
    there = site.getsitepackages([str(ENVIRONMENT)])
    sys.path += there
    yield pytest.importorskip("tritonclient.grpc")
    for path in there:
        sys.path.remove(path)


def asked(body: dict[str, Any]) -> dict[str, Any]:
    """In Triton's names."""
    return {"text_input" if name == "prompt" else name: value for name, value in body.items()}


def tensors(client: Any, **body: Any) -> list[Any]:
    """As Triton's OpenAI frontend sends them: one row, and in it one value or several."""
    made = []
    for name, value in body.items():
        array = np.array([value if isinstance(value, list) else [value]], DTYPES[name])
        made.append(client.InferInput(name, array.shape, client._utils.np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array)
    return made


@contextmanager
def streaming(client: Any, server: Triton, **body: Any) -> Iterator[tuple[Any, SimpleQueue[Any]]]:
    """A stream over gRPC, with a queue of its pieces and errors."""
    came: SimpleQueue[Any] = SimpleQueue()
    with client.InferenceServerClient(server.grpc) as connection:
        connection.start_stream(lambda result, error: came.put(error or result))
        connection.async_stream_infer(server.model, tensors(client, **body), enable_empty_final_response=True)
        yield connection, came


def pieces(came: "SimpleQueue[Any]") -> list[tuple[str, int, int, str]]:
    """Text, tokens of the prompt and of the piece, and why it ended, of each until the last."""
    told, last = [], False
    while not last:
        piece = came.get(timeout=SECONDS)
        assert hasattr(piece, "get_response"), piece
        last = piece.get_response().parameters["triton_final_response"].bool_param
        text, prompt, tokens, reason = (
            piece.as_numpy(name).item()
            for name in ("text_output", "num_input_tokens", "num_output_tokens", "finish_reason")
        )
        told.append((text.decode(), prompt, tokens, reason.decode()))
    return told


def test_it_answers_as_the_bundle_does(server: Triton, model: Bundle, lone: Lone) -> None:
    assert server.check().returncode == 0
    for body in (GREEDY, DRAWN):
        answer = server.generate(**asked(body)).json()
        assert (answer["text_output"], answer["finish_reason"]) == (lone.says(body), "length")
        assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (len(body["prompt"]), body["max_tokens"])
    asked_too = ["--prompt", GREEDY["prompt"], "--max-new-tokens", "40", "--json"]
    done = subprocess.run([sys.executable, "-m", "fope_export", "run", model.path, *asked_too], capture_output=True)
    assert json.loads(done.stdout)[0]["text"] == lone.says(GREEDY)


def test_another_text_is_found(server: Triton) -> None:
    told = json.loads((server.folder / "check.json").read_text())
    (server.folder / "check.json").write_text(json.dumps(told | {"text": "wrong"}))
    try:
        done = server.check()
        assert done.returncode == 1 and "expected: 'wrong'" in done.stderr and repr(told["text"]) in done.stderr
    finally:
        (server.folder / "check.json").write_text(json.dumps(told))


def test_a_stream_is_the_whole_text_in_pieces(server: Triton, lone: Lone) -> None:
    with server.events(**asked(DRAWN), stream=True) as events:
        told = list(events)
    assert "".join(event["text_output"] for event in told) == lone.says(DRAWN)
    assert sum(event["num_output_tokens"] for event in told) == DRAWN["max_tokens"]
    assert [event["finish_reason"] for event in told if event["finish_reason"]] == ["length"]


def test_streams_over_grpc_are_told_apart_and_whole(server: Triton, client: Any, lone: Lone) -> None:
    bodies = [DRAWN | {"seed": seed} for seed in (1, 2, 3)]  # two at once, and one waits
    told: dict[int, list[tuple[str, int, int, str]]] = {}

    def one(body: dict[str, Any]) -> None:
        counted = {"return_num_input_tokens": True, "return_num_output_tokens": True}
        with streaming(client, server, **asked(body), stream=True, **counted) as (_, came):
            told[body["seed"]] = pieces(came)

    threads = [threading.Thread(target=one, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for body in bodies:
        texts, prompts, tokens, reasons = zip(*told[body["seed"]], strict=True)
        assert "".join(texts) == lone.says(body) and sum(tokens) == body["max_tokens"]
        assert {*prompts} == {len(body["prompt"])} and reasons[-1] == "length" and not any(reasons[:-1])


def test_stop_words_guides_and_echo(server: Triton, lone: Lone) -> None:
    whole = lone.says(GREEDY)
    stop = whole[10:13]
    stopped = server.generate(**asked(GREEDY), stop_words=[stop, "never there"]).json()
    assert (stopped["text_output"], stopped["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "[0-9]{3}"}
    assert server.generate(**asked(GREEDY), **guide).json()["text_output"].isdigit()
    schema = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": '{"enum": [7]}'}
    assert server.generate(**asked(GREEDY), **schema).json()["text_output"] == "7"
    given = {"text_input": GREEDY["prompt"], "id": "x", "parameters": {"max_tokens": 40, "temperature": 0}}
    assert server.generate(**given).json()["text_output"] == whole
    echoed = server.generate(**asked(GREEDY), exclude_input_in_output=False).json()
    assert echoed["text_output"] == GREEDY["prompt"] + whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature: Expected `float` >= 0.0"),
        ({"max_tokens": 5000}, "the prompt has 9 tokens and the answer may have 5,000, and 4,096 fit together"),
        ({"text_input": ""}, "a prompt is empty"),
        ({"guided_decoding_guide_type": "ebnf", "guided_decoding_guide": "x"}, "there is no guide of type 'ebnf'"),
        ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "["}, "regex cannot be followed"),
        ({"stop_words": [""]}, "stop: Expected `str` of length >= 1"),
        ({"best_of": 2}, "there is no parameter or tensor best_of"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(fields: dict[str, Any], message: str, server: Triton) -> None:
    for path in ("generate", "generate_stream"):
        answer = httpx.post(f"{server.path}/{path}", json=asked(GREEDY) | fields, timeout=SECONDS)
        assert message in answer.text and (path == "generate_stream" or answer.status_code >= 400)
    assert server.ready


def test_a_full_queue_refuses(server: Triton, client: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        with two_over_http(server, client):
            asking = [pool.submit(server.generate, **asked(GREEDY)) for _ in range(3)]
            refused = list(islice(as_completed(asking), 2))
        answers = {each.result().status_code for each in asking if each not in refused}
    assert all("would wait, and 1 may" in each.result().text for each in refused) and answers == {200}


@contextmanager
def two_over_http(server: Triton, client: Any) -> Iterator[int]:
    with server.events(**LONG) as one, server.events(**LONG) as other:
        next(other)
        yield sum(next(one)["num_output_tokens"] for _ in range(50))


@contextmanager
def two_over_grpc(server: Triton, client: Any) -> Iterator[int]:
    with streaming(client, server, **LONG) as (one, came), streaming(client, server, **LONG) as (other, also):
        also.get(timeout=SECONDS)
        yield sum(came.get(timeout=SECONDS).as_numpy("num_output_tokens").item() for _ in range(50))
        for connection in (one, other):
            connection.stop_stream(cancel_requests=True)


@pytest.mark.parametrize("two", [two_over_http, two_over_grpc])
def test_an_answer_that_nobody_wants_leaves_its_slot(two: Any, server: Triton, client: Any) -> None:
    """Both slots are taken, then left by who goes away, or cancels: the next request does not wait for the rest."""
    began = time.monotonic()
    with two(server, client) as made:
        pace = (time.monotonic() - began) / made
    began = time.monotonic()
    assert server.generate(**asked(GREEDY)).status_code == 200
    assert time.monotonic() - began < pace * (LONG["max_tokens"] - made) / 4


def test_it_listens_to_this_machine_alone(server: Triton) -> None:
    assert addresses(server.children()) == {LOOPBACK, MAPPED}


def test_sigterm_lets_running_answers_finish(folder: Path) -> None:
    with triton(folder) as server:
        with server.events(**LONG | {"max_tokens": 1000}) as events:
            told = [next(events)]
            server.process.send_signal(signal.SIGTERM)
            until(lambda: not server.ready)
            with pytest.raises(httpx.HTTPError):
                server.generate(**asked(GREEDY)).raise_for_status()
            told += events
        assert sum(event["num_output_tokens"] for event in told) == 1000 and told[-1]["finish_reason"] == "length"
        assert server.process.wait(SECONDS) == 0


def test_nothing_looks_ready_where_the_models_process_was_killed(folder: Path) -> None:
    with triton(folder) as server:
        assert server.ready
        os.kill(server.stub(), signal.SIGKILL)
        until(lambda: not server.ready)
        assert server.process.wait(SECONDS) == 1
    assert "a model's process has ended" in (folder / "log").read_text()
    assert not [*Path("/dev/shm").glob(f"fope_export_{server.process.pid}_*")]


def test_what_was_not_validated_is_not_served(folder: Path) -> None:
    (config,) = folder.glob("models/*/config.pbtxt")
    before = config.read_text()
    config.write_text(before.replace(OPTIONS, "--threads 1"))
    environment = os.environ | {"PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    ports = {name: str(free_port()) for name in ("PORT", "GRPC_PORT", "METRICS_PORT")}
    try:
        done = subprocess.run(
            [folder / "start"], env=environment | ports, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 1 and "was not validated: there is no" in done.stderr
    finally:
        config.write_text(before)
