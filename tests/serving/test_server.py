"""The server, asked by OpenAI's own client and by others who mean less well."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import openai
import pytest

from fope_export.backends.base import Backend
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.generation import generate_text, log_probabilities
from fope_export.serving import protocol
from fope_export.serving.app import BODY
from fope_export.serving.calls import calls_of_completion
from fope_export.serving.host import Host, Sizes
from fope_export.serving.sampling import SamplingParams
from fope_export.tokens import Tokenizer
from tests.serving.served import Served

PROMPT = "def main("
CHAT = "/v1/chat/completions"
GREEDY: dict[str, Any] = {"model": "model", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}


def told(backend: Backend, text: Tokenizer, prompt: str = PROMPT, **fields: Any) -> str:
    """What the package itself answers."""
    sampling = SamplingParams(**{"max_new_tokens": 24} | fields)
    return "".join(piece for _, piece in generate_text(backend, text, [prompt], sampling))


def test_a_completion_is_what_the_package_answers(server: Served, backend: Backend, text: Tokenizer) -> None:
    done = server.client.completions.create(**GREEDY)
    assert done.choices[0].text == told(backend, text) and done.model == "model"
    assert done.usage is not None and done.usage.prompt_tokens == len(PROMPT)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    drawn = server.client.completions.create(**GREEDY | {"temperature": 0.9, "seed": 7})
    assert drawn.choices[0].text == told(backend, text, temperature=0.9, seed=7)


def test_a_stream_is_the_whole_text_in_pieces(server: Served) -> None:
    fields = GREEDY | {"temperature": 1.0, "seed": 3, "max_tokens": 200}  # bytes that never become a character too
    whole = server.client.completions.create(**fields)
    chunks = [*server.client.completions.create(**fields, stream=True, stream_options={"include_usage": True})]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    raw = server.http.post("/v1/completions", json=fields | {"stream": True}).text
    assert raw.endswith("data: [DONE]\n\n") and "usage" not in raw


def test_a_chat_and_its_stream(server: Served, backend: Backend, text: Tokenizer) -> None:
    messages: Any = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    fields: dict[str, Any] = {"model": "model", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    done = server.client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    choice = done.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == told(backend, text, "system: x\nuser: y\n", max_new_tokens=12)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 12 and len(choice.logprobs.content[0].top_logprobs) == 2
    pieces = [*server.client.chat.completions.create(**fields, stream=True)]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
    assert pieces[0].choices[0].delta.role == "assistant"


def test_messages_have_roles_and_say_text(server: Served) -> None:
    def asked(*messages: Any) -> httpx.Response:
        return server.ask({"model": "model", "messages": messages, "max_tokens": 4, "temperature": 0}, CHAT)

    for message in ({"content": "x"}, {"role": 5, "content": "x"}, {"role": "user"}, {"role": "user", "content": 7}):
        assert (answer := asked(message)).status_code == 400 and answer.json()["error"]["param"] == "messages"
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert asked({"role": "user", "content": [image]}).status_code == 400
    parts = [{"type": "text", "text": text} for text in ("a", "b")]
    answers = [asked({"role": "user", "content": said}).json()["choices"] for said in (parts, "a\nb")]
    assert answers[0] == answers[1]


def test_log_probabilities_are_the_packages(server: Served, backend: Backend) -> None:
    scored = server.client.completions.create(
        **GREEDY | {"prompt": "return None", "max_tokens": 0, "echo": True, "logprobs": 1}
    )
    choice = scored.choices[0]
    assert choice.text == "return None" and choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens == [*"return None"] and choice.logprobs.text_offset == [*range(11)]
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs is not None
    wanted = log_probabilities(backend, [*b"return None"])
    # one pass over all tokens or by the engine's chunks: the same sums in another order
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], wanted, atol=1e-4)
    made = server.client.completions.create(**GREEDY | {"logprobs": 0, "max_tokens": 3}).choices[0].logprobs
    assert made is not None and made.top_logprobs is not None and [len(each) for each in made.top_logprobs] == [1] * 3


def test_bytes_that_are_no_text_have_names_of_their_own(server: Served) -> None:
    done = server.client.completions.create(
        model="model", prompt=[200, 201], max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == [r"bytes:\xc8", r"bytes:\xc9"]
    assert done.choices[0].text == "��"


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_string_ends_a_text_and_never_shows(seed: int, server: Served) -> None:
    fields = GREEDY | {"temperature": 1.0, "seed": seed, "max_tokens": 60}
    whole = server.client.completions.create(**fields).choices[0].text
    stop = whole[10:12]
    at = whole.index(stop)
    stopped = server.client.completions.create(**fields, stop=[stop, "never there"], logprobs=0).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[:at], "stop")
    assert stopped.logprobs is not None and stopped.logprobs.text_offset is not None
    assert all(offset < at for offset in stopped.logprobs.text_offset)
    pieces = [*server.client.completions.create(**fields, stop=stop, stream=True)]
    assert "".join(piece.choices[0].text for piece in pieces) == whole[:at]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_several_answers_to_several_prompts(server: Served) -> None:
    fields = GREEDY | {"temperature": 1.0, "seed": 5, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    done = server.client.completions.create(**fields | {"prompt": ["aaaa", "bbbb"], "n": 3})
    texts = [choice.text for choice in done.choices]
    assert [choice.index for choice in done.choices] == [*range(6)] and len({*texts[:3]}) == len({*texts[3:]}) == 3
    assert done.usage is not None and done.usage.prompt_tokens == 8 and done.usage.completion_tokens == 144
    assert server.client.completions.create(**fields | {"prompt": "bbbb"}).choices[0].text == texts[3]


def test_a_prefix_that_was_there_is_told(server: Served) -> None:
    fields = GREEDY | {"prompt": "a prefix that is long enough to be kept", "max_tokens": 2}
    first = server.client.completions.create(**fields)
    again = server.client.completions.create(**fields)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == len(fields["prompt"]) - 1
    assert again.choices[0].text == first.choices[0].text


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("streamed", [False, True])
def test_answers_of_a_form(streamed: bool, server: Served) -> None:
    fields = GREEDY | {"temperature": 1.0, "seed": 1, "max_tokens": 200}

    def asked(**form: Any) -> str:
        if not streamed:
            return str(server.client.completions.create(**fields, extra_body=form).choices[0].text)
        pieces = server.client.completions.create(**fields, extra_body=form, stream=True)
        return "".join(piece.choices[0].text for piece in pieces)

    answered = asked(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    assert isinstance(json.loads(answered)["a"], int)
    assert isinstance(json.loads(asked(structured_outputs={"json": SCHEMA}))["a"], int)
    assert re.fullmatch("[ab]{3,5}", asked(structured_outputs={"regex": "[ab]{3,5}"}))
    assert re.fullmatch("(yes|no)!", asked(structured_outputs={"grammar": 'start: ("yes" | "no") "!"'}))


WRONG: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "another"}, 404, "model"), ({"stop": 5}, 400, "stop"), ({"stop": ""}, 400, "stop"),
    ({"stop": ["x"] * 17}, 400, "stop"), ({"logit_bias": [1, 2]}, 400, "logit_bias"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"), ({"logit_bias": {"999": 1}}, 400, "logit_bias"),
    ({"stop": "x" * 1001}, 400, "stop"), ({"suffix": "none"}, 400, "suffix"), ({"best_of": True}, 400, "best_of"),
    ({"prompt": ["a"] * 1000, "n": 3}, 400, "prompt"),
    ({"temperature": -1}, 400, "temperature"), ({"temperature": "warm"}, 400, "temperature"),
    ({"top_p": 1.5}, 400, "top_p"), ({"top_k": -2}, 400, "top_k"), ({"n": 0}, 400, "n"), ({"n": 500}, 400, "n"),
    ({"max_tokens": -1}, 400, "max_tokens"), ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"), ({"max_tokens": 100_000}, 400, "max_tokens"),
    ({"logprobs": 100}, 400, "logprobs"), ({"seed": "x"}, 400, "seed"), ({"stream": "yes"}, 400, "stream"),
    ({"prompt": ""}, 400, "prompt"), ({"prompt": []}, 400, "prompt"), ({"prompt": [999]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"), ({"prompt": ["a", 1]}, 400, "prompt"), ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, None), ({"prompt": "a" * 9000}, 400, "prompt"), ({"anything": 1}, 400, "anything"),
    ({"tools": [{}]}, 400, "tools"), ({"functions": [{}]}, 400, "functions"), ({"suffix": "x"}, 400, "suffix"),
    ({"best_of": 2}, 400, "best_of"), ({"store": True}, 400, "store"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, 400, "response_format"),
    ({"structured_outputs": {"regex": "[a"}}, 400, "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * 70_000}}, 400, "structured_outputs"),
    ({"structured_outputs": {}}, 400, "structured_outputs"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_request_is_told_what_is_wrong(
    fields: dict[str, Any], status: int, param: str | None, server: Served
) -> None:
    answer = server.ask(GREEDY | fields)
    error = answer.json()["error"]
    assert answer.status_code == status and error.keys() >= {"message", "type", "param", "code"}
    assert error["param"] == param and error["message"]


def test_null_is_absent_and_some_fields_are_ignored(server: Served) -> None:
    more: dict[str, Any] = {"stream_options": {"include_usage": None}}
    more |= {
        "anything": None,
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "best_of": 1,
    }
    assert server.ask(GREEDY | more).json()["choices"] == server.ask(GREEDY).json()["choices"]


def test_a_prompt_that_does_not_fit_is_told_both_numbers(server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(**GREEDY | {"max_tokens": 5000})
    error: Any = caught.value.body
    length = server.client.models.list().data[0].model_dump()["max_model_len"]
    assert (error["prompt_tokens"], error["max_tokens"], error["max_model_len"]) == (9, 5000, length)
    assert f"{length:,}" in error["message"] and "5,000" in error["message"]


RAW: dict[str, tuple[bytes, int]] = {
    "a length and chunks": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400
    ),
    "no HTTP": (b"hello\r\n\r\n", 400),
    "a long head": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n", 400),
    "a length that is too large": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        b"Content-Length: 99999999\r\n\r\n", 413
    ),
    "a method nobody knows": (b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_what_is_hardly_a_request(name: str, server: Served) -> None:
    sent, status = RAW[name]
    answer = server.raw(sent)
    assert answer.startswith(f"HTTP/1.1 {status}".encode()) and b'{"error":' in answer.replace(b" ", b"")
    assert server.http.get("/health/ready").status_code == 200


BODIES: dict[str, tuple[bytes, str, int]] = {
    "no JSON": (b"{", "application/json", 400),
    "deep": (b"[" * 100_000, "application/json", 400),
    "deep inside": (b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "application/json", 400),
    "deeper than a schema": (
        b'{"structured_outputs": {"json": ' + b'{"a":' * 70 + b"1" + b"}" * 72,
        "application/json",
        400,
    ),
    "deep as Python's stack": (b'{"prompt":' + b"[" * 980 + b"]" * 980 + b"}", "application/json", 400),
    "null": (b"null", "application/json", 400),
    "a list": (b"[]", "application/json", 400),
    "a number": (b"7", "application/json", 400),
    "a key twice": (b'{"model": "model", "model": "model", "prompt": "a"}', "application/json", 400),
    "no number": (b'{"model": "model", "prompt": "a", "temperature": NaN}', "application/json", 400),
    "no UTF-8": (b'{"prompt": "\xff"}', "application/json", 400),
    "large": (b" " * (BODY + 1), "application/json", 413),
    "another type": (b"{}", "text/plain", 415),
    "no type": (b"{}", "", 415),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_refused(name: str, server: Served) -> None:
    body, kind, status = BODIES[name]
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": kind} if kind else {})
    assert (answer.status_code, [*answer.json()]) == (status, ["error"])


def test_routes(server: Served) -> None:
    assert server.http.get("/nowhere").status_code == 404
    assert server.ask(GREEDY, "/v1/completions/").status_code == 404
    assert server.http.get("/v1/completions").status_code == 405
    assert server.http.get("/v1/models/model").json()["id"] == "model"
    assert server.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert server.http.get("/health/live").json()["status"] == "alive"
    tokens = server.ask({"prompt": "hi"}, "/tokenize").json()
    assert (tokens["tokens"], tokens["count"]) == ([104, 105], 2)
    assert server.ask({"tokens": [104, 105]}, "/detokenize").json() == {"prompt": "hi"}
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers={"Origin": "http://x"}).headers
    assert server.metric("generation_tokens_total") > 0


LONG = GREEDY | {"max_tokens": 900, "ignore_eos": True}


def test_who_hangs_up_frees_the_slot(server: Served) -> None:
    for streamed in (True, False):
        with httpx.Client(base_url=server.url) as leaving, ThreadPoolExecutor(1) as pool:
            if streamed:
                with leaving.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
                    next(answer.iter_lines())
            else:
                waiting = pool.submit(leaving.post, "/v1/completions", json=LONG | {"n": 4}, timeout=0.1)
                with pytest.raises(httpx.ReadTimeout):
                    waiting.result()
        server.until("num_requests_running", 0)


def test_a_full_queue_says_when_to_come_again(server: Served) -> None:
    body = LONG | {"n": 9}  # four slots and four that wait
    answer = server.ask(body)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    server.until("num_requests_running", 0)


def test_many_clients_get_their_own_answers(server: Served, backend: Backend, text: Tokenizer) -> None:
    """Near-ties apart, an answer is the same in any company: greedy texts of equal prompts are."""
    prompts = [f"value_{i % 4} = " for i in range(16)]
    gate = threading.Semaphore(8)

    def asked(prompt: str) -> str:
        with gate:
            done = server.client.completions.create(**GREEDY | {"prompt": prompt, "max_tokens": 6})
            return str(done.choices[0].text)

    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(asked, prompts)]
    alone = {prompt: told(backend, text, prompt, max_new_tokens=6) for prompt in {*prompts}}
    assert answers == [alone[prompt] for prompt in prompts]


def test_what_was_not_validated_is_not_served(asked: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(asked.path), "--port", "0"]) == 2
    assert "was not validated" in capsys.readouterr().err


def test_it_describes_itself(server: Served) -> None:
    document = server.http.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0" and document["paths"].keys() >= {"/v1/completions", "/health/ready"}
    assert document["components"]["schemas"]["Completion"]["properties"]["model"] == {"enum": ["model"]}


def test_a_schema_is_compiled_once_for_all_answers(asked: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("model", asked, lambda: load_backend(asked), Sizes())
    follow = Mock(wraps=host.follow)
    monkeypatch.setattr(host, "follow", follow)
    form = protocol.StructuredOutputs(regex="[ab]{3}")
    call = calls_of_completion(
        host, protocol.Completion(model="model", prompt=["a", "b"], n=4, structured_outputs=form)
    )
    grammars = [request.grammar for request in call.requests]
    assert follow.call_count == 1 and len({id(each) for each in grammars}) == 8
    first, second = grammars[:2]
    assert first is not None and second is not None
    before = second.allowed().copy()
    for _ in range(3):
        first.accept(97)
    assert first.done and not second.done and (second.allowed() == before).all()
