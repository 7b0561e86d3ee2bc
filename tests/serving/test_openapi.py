"""Requests that schemathesis makes of the server's own description: whatever they are, the server does not fail."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests.serving.served import SECONDS, Served

EXAMPLES = 40
"""Of each operation, right ones and wrong ones each."""
FEW = settings(
    max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[*HealthCheck],
)  # fmt: skip


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_makes_it_fail(mode: GenerationMode, server: Served) -> None:
    seen = Counter[str]()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing can be wrong with it

        @seed(1)
        @FEW
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: "schemathesis.Case[Any]") -> None:
            status = case.call(timeout=SECONDS).status_code
            seen[f"{status // 100}xx"] += 1
            assert status < 500, case.as_curl_command()

        holds()
    assert seen["2xx" if mode is GenerationMode.POSITIVE else "4xx"]
