"""One request to the server: the engine's requests that it becomes, and what is told of their answers."""

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fope_export.errors import ConfigError
from fope_export.serving.answers import Answer, Piece, Told, chat_logprobs, completion_logprobs, told
from fope_export.serving.host import Host
from fope_export.serving.protocol import Asked, Chat, Completion, RequestError, refused
from fope_export.serving.requests import Request
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.structured import Following

USUAL = 16
"""Tokens of a completion where nobody says how many."""
ANSWERS = 2048
"""Of one request, at most."""


class Call:
    """Some prompts, each with as many answers as were asked for. Its methods are for the event loop's thread."""

    def __init__(self, host: Host, asked: Asked, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> None:
        self.host, self.asked, self.requests = host, asked, requests
        self.is_chat, self.created = isinstance(asked, Chat), int(time.time())
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.changed, self._woken = asyncio.Event(), False
        self.failure: Exception | None = None
        self.prompt_tokens = sum(map(len, prompts))
        self.began, self.before, self.last = time.monotonic(), 0.0, 0.0
        """When it came, and when something was told of it, last but one and last."""
        self._answers: list[Answer] = []
        self._told: list[Piece] = [Piece() for _ in requests]
        """What was told of each answer."""
        self._echoed = [False] * len(requests)

    def submit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have them answered. Raises BusyError and BackendError as `Host.submit`; then none is."""

        def notify() -> None:
            if not self._woken:
                self._woken = True
                with suppress(RuntimeError):  # the loop is closed, and nobody waits
                    loop.call_soon_threadsafe(self._wake)

        each = self.asked.stream or bool(self.asked.stops)  # else nobody looks before the end
        try:
            for request in self.requests:
                handle = self.host.submit(request, notify, each=each)
                self._answers.append(Answer(handle, self.host.text, self.asked.stops))
        except BaseException:
            self.cancel()
            raise

    def _wake(self) -> None:
        self._woken = False
        self.changed.set()

    def cancel(self) -> None:
        """End what is not over."""
        for answer in self._answers:
            answer.handle.cancel()
        self.host.wake()

    @property
    def over(self) -> bool:
        """Whether every answer is whole, or one failed."""
        return self.failure is not None or all(piece.reason for piece in self._told)

    @property
    def completion_tokens(self) -> int:
        return sum(answer.count for answer in self._answers)

    @property
    def first(self) -> float:
        """When the first token came."""
        return min((answer.handle.first for answer in self._answers if answer.handle.first), default=self.last)

    @property
    def reasons(self) -> list[str]:
        """Why each answer ended."""
        return [piece.reason or "cancelled" for piece in self._told]

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and all answers."""
        prompt, made = self.prompt_tokens, self.completion_tokens
        cached = sum(answer.handle.cached for answer in self._answers[:: self.asked.n])
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def take(self) -> Iterator[dict[str, Any]]:
        """Chunks of what is new."""
        for index, (answer, whole) in enumerate(zip(self._answers, self._told, strict=True)):
            if whole.reason:
                continue
            piece = answer.take()
            if answer.failure:
                self.failure = answer.failure
                return
            if not (piece.text or piece.tokens or piece.reason):
                continue
            piece = self._with_echo(index, piece)
            self.before, self.last = self.last, time.monotonic()
            chunk = self.chunk([self._choice(index, piece)])
            whole.text += piece.text
            whole.tokens += piece.tokens
            whole.reason = piece.reason
            yield chunk

    def _with_echo(self, index: int, piece: Piece) -> Piece:
        """The prompt before the first piece, and offsets from its beginning, where it is asked for."""
        if not (isinstance(self.asked, Completion) and self.asked.echo):
            return piece
        answer, text = self._answers[index], self.host.text
        ids = answer.handle.request.prompt
        shown, first = text.decode(ids), not self._echoed[index]
        self._echoed[index] = True
        tokens = [replace(each, offset=len(shown) + each.offset) for each in piece.tokens]
        if not first:
            return Piece(piece.text, tokens, piece.reason)
        before, stream, offset = list[Told](), text.stream(), 0
        for i, token in enumerate(ids if self.asked.logprobs is not None else ()):
            before.append(told(text, token, answer.handle.prompt_logprobs[i - 1] if i else None, offset))
            offset += len(stream.push(token))
        return Piece(shown + piece.text, [*before, *tokens], piece.reason)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        reason = "stop" if piece.reason in ("cancelled", "deadline") else piece.reason
        logprobs: dict[str, Any] | None = None
        if isinstance(self.asked, Chat):
            said = {"content": piece.text}
            text: dict[str, Any] = {"delta": said if self._told[index].text else {"role": "assistant"} | said}
            logprobs = chat_logprobs(piece.tokens) if self.asked.logprobs else None
        else:
            assert isinstance(self.asked, Completion)
            text = {"text": piece.text}
            logprobs = None if self.asked.logprobs is None else completion_logprobs(piece.tokens)
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """An event of a stream."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._head(kind, choices) | ({"usage": usage} if usage else {})

    def whole(self) -> dict[str, Any]:
        """The answers, when all are."""
        choices = []
        for index, piece in enumerate(self._told):
            choice = self._choice(index, piece)
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": choice.pop("delta")["content"]}
            choices.append(choice)
        return self._head("chat.completion" if self.is_chat else "text_completion", choices) | {"usage": self.usage}

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.host.name, "choices": choices}


def calls_of_completion(host: Host, asked: Completion) -> Call:
    """Raises RequestError where it does not fit, or a field says what the bundle does not have."""
    prompts = [host.text.encode(each) if isinstance(each, str) else each for each in asked.prompts]
    for prompt in prompts:
        if not prompt:
            raise RequestError("a prompt is empty, and the model has no token to begin with", param="prompt")
        if outside := [token for token in prompt if token >= host.model.vocab_size]:
            raise RequestError(
                f"token {outside[0]} is outside the vocabulary of {host.model.vocab_size}", param="prompt"
            )
    limit = host.defaults.get("max_new_tokens", USUAL) if asked.max_tokens is None else asked.max_tokens
    if limit == 0 and not asked.echo:
        raise RequestError("max_tokens is 0, and nothing is echoed", param="max_tokens")
    scored = asked.logprobs if asked.echo else None
    return _call(host, asked, prompts, limit, told=asked.logprobs, scored=scored, given=asked.max_tokens is not None)


def calls_of_chat(host: Host, asked: Chat) -> Call:
    """The same of a chat."""
    if host.chat is None:
        raise RequestError(f"{host.name} has no chat template", hint="Ask /v1/completions.", param="messages")
    if asked.top_logprobs and not asked.logprobs:
        raise RequestError("top_logprobs needs logprobs", param="top_logprobs")
    try:
        text = host.chat.render(asked.plain)
    except ConfigError as cause:
        raise refused(cause, "messages") from cause
    prompt = host.text.encode(text, special=False)
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if limit == 0:
        raise RequestError("max_completion_tokens is 0", param="max_completion_tokens")
    given = limit is not None
    if limit is None:
        limit = host.defaults.get("max_new_tokens", max(host.length - len(prompt), 1))
    return _call(host, asked, [prompt], limit, told=(asked.top_logprobs or 0) if asked.logprobs else None, given=given)


def _call(
    host: Host, asked: Asked, prompts: Sequence[Sequence[int]], limit: int, *, told: int | None,
    scored: int | None = None, given: bool,
) -> Call:  # fmt: skip
    if len(prompts) * asked.n > ANSWERS:
        raise RequestError(
            f"{len(prompts):,} prompts with {asked.n} answers each, and {ANSWERS:,} answers may be asked for at once",
            param="prompt" if len(prompts) > 1 else "n",
        )
    longest = max(map(len, prompts))
    if longest + limit > host.length and not given and longest < host.length:
        limit = host.length - longest
    if longest + limit > host.length:
        raise RequestError(
            f"the prompt has {longest:,} tokens and the answer may have {limit:,}, and {host.length:,} fit together",
            param="max_tokens" if longest < host.length else "prompt", code="context_length_exceeded",
            prompt_tokens=longest, max_tokens=limit, max_model_len=host.length,
        )  # fmt: skip
    sampling = _sampling(host, asked, limit)
    try:
        sampling.check(size := host.model.vocab_size)
    except ConfigError as cause:
        raise refused(cause, "logit_bias") from cause
    grammar = _grammar(host, asked)
    stops = (token for token in asked.stop_token_ids if token < size)
    ends = {*stops, *(() if asked.ignore_eos else host.model.ends)}
    requests = [
        Request(
            prompt=prompt,
            sampling=sampling,
            ends=ends,
            choice=choice,
            logprobs=told,
            prompt_logprobs=scored,
            grammar=grammar and grammar.copy(),
        )
        for prompt in prompts
        for choice in range(asked.n)
    ]
    return Call(host, asked, prompts, requests)


def _grammar(host: Host, asked: Asked) -> Following | None:
    if (form := asked.form) is None:
        return None
    try:
        return host.follow(form)
    except ConfigError as cause:
        raise refused(cause, "response_format" if asked.response_format else "structured_outputs") from cause


def _sampling(host: Host, asked: Asked, limit: int) -> SamplingParams:
    """What is asked, else what generation_config.json says, else OpenAI's defaults."""
    usual: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    chosen = {
        name: host.defaults.get(name, value) if (given := getattr(asked, name)) is None else given
        for name, value in usual.items()
    }
    if chosen["top_p"] == 0:  # the likeliest alone
        chosen |= {"top_p": 1.0, "temperature": 0.0}
    seed = secrets.randbits(63) if asked.seed is None else asked.seed % (1 << 63)
    return SamplingParams(
        max_new_tokens=limit, min_new_tokens=asked.min_tokens, seed=seed, logit_bias=asked.biases,
        presence_penalty=asked.presence_penalty, frequency_penalty=asked.frequency_penalty,
        **(chosen | {"top_k": max(int(chosen["top_k"]), 0)}),
    )  # fmt: skip
