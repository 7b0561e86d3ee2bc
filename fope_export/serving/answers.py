"""An answer as it is told: text that is certain, tokens that belong to it, and why it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fope_export.serving.requests import Failed, Finished, Handle, Logprobs, Token
from fope_export.tokens import TextStream, Tokenizer


@dataclass(frozen=True)
class Told:
    """One token with its probability, as text that is never two tokens'."""

    token: str
    bytes: tuple[int, ...]
    offset: int
    """Characters of the text before it."""
    logprob: float | None
    """None for the first token of a prompt, which nothing stands before."""
    top: tuple[tuple[str, tuple[int, ...], float], ...] = ()
    """Likeliest tokens, their bytes and their logarithms of probability."""


@dataclass
class Piece:
    """What became certain of an answer."""

    text: str = ""
    tokens: list[Told] = field(default_factory=list)
    reason: str | None = None
    """Why the answer is over; None while it is not."""


def named(text: Tokenizer, token: int) -> tuple[str, tuple[int, ...]]:
    """A token's text and bytes; bytes that are no text are named by their numbers, so that no two look alike."""
    raw = text.bytes_of(token)
    try:
        return raw.decode(), tuple(raw)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), tuple(raw)


def told(text: Tokenizer, token: int, logprobs: Logprobs | None, offset: int) -> Told:
    """A token with what is known of its probability."""
    name, raw = named(text, token)
    if logprobs is None:
        return Told(name, raw, offset, None)
    top = tuple((*named(text, each), value) for each, value in logprobs.top)
    return Told(name, raw, offset, logprobs.own, top)


class Answer:
    """Turns the events of one request into text. It ends with an end token, which is no text, or before a stop string.

    What is told of its tokens is held back until their text is certain.
    """

    def __init__(self, handle: Handle, text: Tokenizer, stop: Sequence[str]) -> None:
        self.handle, self._text = handle, text
        self._stream = text.stream(stop)
        self._place: TextStream | None = text.stream() if handle.request.logprobs is not None else None
        self._shown = self._offset = 0
        self._held: list[Told] = []
        self.count = 0
        """Tokens of the answer, that which ended it included."""
        self.failure: Exception | None = None

    def take(self) -> Piece:
        """What is new. After the piece with a reason there is nothing more."""
        piece = Piece()
        for event in self.handle.take():
            if isinstance(event, Token):
                self._push(event, piece)
            elif isinstance(event, Failed):
                self.failure = event.cause
                piece.reason = "error"
            else:
                self._finish(event, piece)
            if piece.reason:
                break
        self._shown += len(piece.text)
        whole = piece.reason is not None and not self._stream.stopped
        piece.tokens = [each for each in self._held if whole or each.offset < self._shown]
        self._held = self._held[len(piece.tokens) :]
        return piece

    def _push(self, event: Token, piece: Piece) -> None:
        self.count += 1
        if self._place is not None:
            self._held.append(told(self._text, event.id, event.logprobs, self._offset))
            self._offset += len(self._place.push(event.id))
        if event.id in self.handle.request.ends:
            return
        piece.text += self._stream.push(event.id)
        if self._stream.stopped:
            piece.reason = "stop"
            self.handle.cancel()

    def _finish(self, event: Finished, piece: Piece) -> None:
        piece.text += self._stream.flush()
        piece.reason = "stop" if self._stream.stopped else event.reason


def completion_logprobs(tokens: Sequence[Told]) -> dict[str, Any]:
    """The shape that /v1/completions has."""
    return {
        "tokens": [each.token for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [
            None if each.logprob is None else {each.token: each.logprob} | {name: value for name, _, value in each.top}
            for each in tokens
        ],
        "text_offset": [each.offset for each in tokens],
    }


def chat_logprobs(tokens: Sequence[Told]) -> dict[str, Any]:
    """The shape that /v1/chat/completions has."""
    return {
        "content": [
            {
                "token": each.token, "logprob": each.logprob, "bytes": each.bytes,
                "top_logprobs": [{"token": n, "bytes": raw, "logprob": value} for n, raw, value in each.top],
            }
            for each in tokens
        ]
    }  # fmt: skip
