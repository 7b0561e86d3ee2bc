"""What a Dynamo frontend was seen to ask becomes the engine's requests; what cannot be served is refused."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.deploy.base import shortest
from fope_export.deploy.dynamo_requests import Answered, chunk_of, request_of
from fope_export.errors import BackendError
from fope_export.serving.host import Host, Sizes
from fope_export.serving.protocol import RequestError
from fope_export.serving.requests import Failed, Finished, Logprobs, Token

FLOAT32 = 0.8999999761581421
SEEN: dict[str, Any] = {
    "model": "model", "token_ids": [100, 101],
    "stop_conditions": {"max_tokens": 100, "stop": ["x"], "stop_token_ids": None, "stop_token_ids_hidden": [0],
                        "min_tokens": 60, "ignore_eos": None, "max_thinking_tokens": None},
    "sampling_options": {"n": None, "best_of": None, "frequency_penalty": 0.0, "temperature": FLOAT32, "top_k": 5,
                         "seed": 5, "include_stop_str_in_output": None, "guided_decoding": None},
    "output_options": {"logprobs": 2, "prompt_logprobs": None, "skip_special_tokens": None},
    "eos_token_ids": [0], "mdc_sum": "3dfa", "annotations": [], "routing": {}, "router_config_override": None,
}  # fmt: skip


def seen(group: str = "", **fields: Any) -> dict[str, Any]:
    """A request with other fields in one of its groups, or beside them."""
    return SEEN | ({group: SEEN[group] | fields} if group else fields)


@pytest.fixture(scope="module")
def host(bundle: Bundle) -> Iterator[Host]:
    host = Host("model", bundle, lambda: load_backend(bundle), Sizes(length=200))
    host.start()
    yield host
    host.close()


def test_everything_that_is_asked_is_followed(host: Host) -> None:
    request = request_of(host, SEEN)
    assert list(request.prompt) == [100, 101] and request.ends == {0} and request.logprobs == 2
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed) == (100, 60, 5)
    assert (sampling.temperature, sampling.top_k) == (0.9, 5)


def test_numbers_are_as_they_were_asked() -> None:
    assert shortest(FLOAT32) == 0.9 and shortest(0.5) == 0.5


def test_without_a_limit_a_completion_is_short(host: Host) -> None:
    request = request_of(host, seen("stop_conditions", max_tokens=None, min_tokens=None))
    assert request.sampling.max_new_tokens == 16


def test_without_a_limit_a_chat_may_fill_the_slot(spoilable: Bundle) -> None:
    (spoilable.path / "chat_template.jinja").write_text("{{ messages }}")
    host = Host("model", spoilable, lambda: load_backend(spoilable), Sizes(length=200))
    request = request_of(host, seen("stop_conditions", max_tokens=None, min_tokens=None))
    assert request.sampling.max_new_tokens == 198


@pytest.mark.parametrize(
    ("guided", "first"),
    [
        ({"regex": "[ab]"}, "ab"),
        ({"choice": ["c", "dö"]}, "cd"),
        ({"grammar": 'start: "e"'}, "e"),
        ({"json": {"type": "array"}}, "["),
    ],
    ids=("regex", "choice", "grammar", "json"),
)
def test_forms_are_followed(host: Host, guided: dict[str, Any], first: str) -> None:
    grammar = request_of(host, seen("sampling_options", guided_decoding=guided | {"backend": None})).grammar
    assert grammar is not None
    allowed = {token for token, may in enumerate(grammar.allowed()) if may}
    assert allowed == {*first.encode()}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (seen("sampling_options", n=2), "n > 1"),
        (seen("sampling_options", best_of=2), "best_of"),
        (seen("sampling_options", use_beam_search=True), "use_beam_search"),
        (seen("sampling_options", guided_decoding={"regex": "a", "whitespace_pattern": "b"}), "whitespace_pattern"),
        (seen("sampling_options", guided_decoding={"regex": "["}), "regex cannot be followed"),
        (seen("stop_conditions", max_thinking_tokens=3), "max_thinking_tokens"),
        (seen("stop_conditions", max_tokens=1000), "2 tokens and the answer may have 1,000, and 200 fit"),
        (seen("output_options", prompt_logprobs=1), "echo and prompt_logprobs"),
        (seen(multi_modal_data={"image_url": []}), "multi_modal_data"),
        (seen(token_ids=[100, 256]), "token 256"),
        (seen(token_ids=[]), "prompt is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_by_name(host: Host, asked: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        request_of(host, asked)


def told(host: Host, asked: dict[str, Any], after: int | None = None) -> list[dict[str, Any]]:
    """The chunks of an answer, cancelled `after` as many."""

    async def collect() -> list[dict[str, Any]]:
        answer, chunks = Answered(host, request_of(host, asked)), []
        async for chunk in answer.chunks():
            chunks.append(chunk)
            if len(chunks) == after:
                answer.cancel()
        return chunks

    return asyncio.run(collect())


def test_an_answer_goes_on_where_another_worker_ended(host: Host) -> None:
    whole = [token for chunk in told(host, SEEN) for token in chunk["token_ids"]]
    migrated = seen("stop_conditions", max_tokens=70, min_tokens=30) | {"token_ids": [100, 101, *whole[:30]]}
    chunks = told(host, migrated)
    assert [token for chunk in chunks for token in chunk["token_ids"]] == whole[30:]
    assert chunks[-1]["finish_reason"] == "length"
    assert sum(len(chunk.get("top_logprobs", ())) for chunk in chunks) == 70


def test_what_is_cancelled_says_so(host: Host) -> None:
    assert told(host, seen("stop_conditions", max_tokens=190), after=1)[-1]["finish_reason"] == "cancelled"


def test_chunks_tell_probabilities_and_failures(host: Host) -> None:
    likely = Logprobs(-0.5, ((97, -0.1), (255, -3.0)))
    chunk = chunk_of([Token(98, likely), Finished("stop")], host.text)
    assert chunk == {
        "index": 0, "token_ids": [98], "log_probs": [-0.5], "finish_reason": "stop",
        "top_logprobs": [[
            {"rank": 1, "token_id": 97, "token": "a", "bytes": (97,), "logprob": -0.1},
            {"rank": 2, "token_id": 255, "token": "bytes:\\xff", "bytes": (255,), "logprob": -3.0},
        ]],
    }  # fmt: skip
    with pytest.raises(BackendError, match="broken"):
        chunk_of([Token(1), Failed(BackendError("broken", hint="Mend it."))], host.text)
