"""What the server's benchmark is made of: its clients, its clocks, and what it takes for a near-tie."""

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving_bench.bench import body, share, spread
from serving_bench.processes import Clients, cpu_of, resident
from serving_bench.ties import Difference, Judge, answers, can_be, compared, differences, requests_of

from fope_export.backends.base import Backend
from fope_export.bundle import Bundle
from fope_export.serving.sampling import Draw, SamplingParams
from tests.serving.served import Served


@pytest.fixture
def clients() -> Iterator[Clients]:
    with Clients() as clients:
        yield clients


def test_clients_get_what_one_gets(clients: Clients, server: Served) -> None:
    server_of: Any = SimpleNamespace(port=server.port)
    asked = [body(f"value_{i} = ", 5, model="model") for i in range(12)]
    told = clients.load(server_of, asked, 4)
    wanted = [server.ask(each).json()["choices"][0]["text"] for each in asked]
    assert [json.loads(each["answer"])["choices"][0]["text"] for each in told["answers"]] == wanted
    assert told["seconds"] > 0 and told["cpu"] > 0
    (stream,) = clients.load(server_of, [asked[0] | {"stream": True, "after": 0.2}])["answers"]
    assert len(stream["times"]) > 1 and stream["times"] == sorted(stream["times"])
    assert stream["answer"].endswith("data: [DONE]\n\n") and stream["began"] < stream["times"][0] < stream["ended"]
    assert clients.load(server_of, [{"prompt": "a"}])["answers"][0]["status"] == 400


def test_clocks() -> None:
    before = cpu_of(os.getpid())
    sum(range(1_000_000))
    assert 0 < cpu_of(os.getpid()) - before < 10
    assert resident(os.getpid()) > 1 << 20


def test_numbers_are_told_with_their_rounds() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "of rounds": [1.0, 3.0]}
    assert [share([*range(100)], percent) for percent in (0, 50, 99)] == [0, 50, 99]


def test_in_company_only_near_ties_differ(asked: Bundle, backend: Backend) -> None:
    requests = requests_of(16, 24)
    alone, beside = answers(backend, requests, 1), answers(backend, requests, 4)
    judge = Judge(asked)
    assert all(judge.near(requests, alone, each) for each in differences(alone, beside))
    for number in (0, 1):  # greedy, drawn
        likely, place = alone[number][5], 5
        assert judge.near(requests, alone, Difference(number, place, likely, likely))
        others = [Difference(number, place, likely, (likely + more) % 256) for more in (1, 50, 100, 150)]
        assert sum(judge.near(requests, alone, each) for each in others) <= 1, "an answer may be anything"


def test_differences_are_found_and_counted() -> None:
    alone, beside = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 7, 8]]
    found = differences(alone, beside)
    assert found == [Difference(1, 1, 5, 7)] and compared(alone, found) == 5


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_near_tie_is_what_rounding_may_decide(temperature: float) -> None:
    draw = Draw(SamplingParams(temperature=temperature), 7)
    logits = np.array([1.0, 1.0 - 1e-6, -5.0])
    if temperature:  # as likely as each other with this place's random numbers too
        logits = np.log(np.array([1e-9, 1e-9, 1.0]))
        assert not can_be(0, logits, 1e-6, draw) and can_be(2, logits, 1e-6, draw)
    else:
        assert can_be(0, logits, 1e-6, draw) and can_be(1, logits, 1e-6, draw) and not can_be(1, logits, 1e-7, draw)
        assert not can_be(2, logits, 1e-6, draw)
