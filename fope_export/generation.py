"""Generation on any backend: prompts in, tokens or text out. For requests of their own each, see `serving.engine`."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, Ids, Logits, Slots
from fope_export.config import Tokens, tokens_of
from fope_export.errors import ConfigError
from fope_export.serving.engine import Engine, Failed, Handle, Request, Token
from fope_export.serving.sampling import SamplingParams
from fope_export.tokens import Tokenizer

AHEAD = 1024
"""New tokens that there is room for from the beginning: answers may be allowed to be far longer than they become."""


def generate(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    eos: Tokens = None,
    chunk: int | None = None,
    max_batch: int = 0,
) -> Generator[tuple[int, int]]:
    """Yield (number of a prompt, its next token) for each token, one of `eos` included, which ends an answer.

    `max_batch` prompts are at work at once (0: all), and when one ends another takes its place. `chunk` is as for
    `Engine`. What a prompt draws does not depend on the prompts beside it (`sampling.sample`).

    Raises ConfigError for an empty prompt, or a bias of a token that there is not, and what a backend raises.
    """
    for number, _, token in _answers(backend, prompts, sampling, eos, chunk, max_batch):
        if token is not None:
            yield number, token


def _answers(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    eos: Tokens,
    chunk: int | None,
    max_batch: int,
) -> Generator[tuple[int, Handle, int | None]]:
    """Tokens as they come, and None when a prompt's are over."""
    if not prompts:
        raise ConfigError("there is no prompt", hint="Give at least one.")
    room = max(map(len, prompts)) + min(sampling.max_new_tokens, AHEAD)
    slots = min(max_batch or len(prompts), len(prompts))
    with closing(Engine(backend, slots, room=room, chunk=chunk, budget=0)) as engine:
        ends = tokens_of(eos)
        left = {
            number: engine.submit(Request(prompt=prompt, sampling=sampling, ends=ends))
            for number, prompt in enumerate(prompts)
        }
        while left:
            engine.step()
            for number, handle in [*islice(left.items(), slots)]:  # who comes first is served first
                for event in handle.take():
                    if isinstance(event, Failed):
                        raise event.cause
                    if not isinstance(event, Token):
                        del left[number]
                    yield number, handle, event.id if isinstance(event, Token) else None


def prefill(slots: Slots, slot: int, ids: Ids, chunk: int) -> Logits:
    """Put a prompt [S] into a row, `chunk` tokens at a time (0: all), and give its last token's logits [V]."""
    size = chunk or len(ids)
    for start in range(0, len(ids), size):
        logits = slots.prefill(slot, ids[start : start + size], start)
    return logits.reshape(-1)


def logits(backend: Backend, ids: Sequence[int], *, chunk: int | None = None) -> Logits:
    """Logits [S, V] after each token of a sequence. `chunk` is as for `Engine`.

    Raises ConfigError for no token, and what a backend raises.
    """
    if not len(ids):
        raise ConfigError("there is no token", hint="Give at least one.")
    size = (backend.chunk if chunk is None else chunk) or len(ids)
    with closing(backend.slots(1, len(ids))) as slots:
        starts = range(0, len(ids), size)
        return np.concatenate([slots.prefill(0, np.array(ids[i : i + size], np.int64), i, last=False) for i in starts])


def log_probabilities(backend: Backend, ids: Sequence[int], *, chunk: int | None = None) -> NDArray[np.float64]:
    """Of each token of a sequence but the first, after those before it: [S - 1], in nats. Raises as `logits` does."""
    relative = logits(backend, ids, chunk=chunk)[:-1].astype(np.float64)
    relative -= relative.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(relative, np.array(ids[1:], np.int64)[:, None], axis=-1)[:, 0]
    scores: NDArray[np.float64] = chosen - np.log(np.exp(relative).sum(axis=-1))
    return scores


def generate_text(
    backend: Backend,
    text: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingParams,
    *,
    stop: Sequence[str] = (),
    eos: Tokens = None,
    chunk: int | None = None,
    max_batch: int = 0,
    special: bool = True,
) -> Iterator[tuple[int, str]]:
    """Yield (number of a prompt, text that became certain, perhaps none) for every token.

    A text ends with one of the tokens `eos` (None: those that the bundle names), and before a `stop` string. `special`
    is as for `Tokenizer.encode`.
    """
    ends = text.ends if eos is None else tokens_of(eos)
    streams = [text.stream(stop) for _ in prompts]
    encoded = [text.encode(prompt, special=special) for prompt in prompts]
    for number, handle, token in _answers(backend, encoded, sampling, ends, chunk, max_batch):
        stream = streams[number]
        if token is None:
            if piece := stream.flush():
                yield number, piece
        elif token not in ends:
            yield number, stream.push(token)
            if stream.stopped:
                handle.cancel()


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Token ids and attention mask [B, longest], padded on the left with token 0."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
