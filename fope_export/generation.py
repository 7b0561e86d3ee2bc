"""Generation on any backend: prompts in, tokens or text out. For requests of their own each, see `serving.engine`."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, Ids, Logits, Piece, Slots, Together
from fope_export.config import Tokens, tokens_of
from fope_export.errors import ConfigError
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Failed, Grammar, Handle, Request, Token
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.speculation import Speculation
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
    grammar: Callable[[], Grammar | None] = lambda: None,
    speculation: Speculation | None = None,
) -> Generator[tuple[int, int]]:
    """Answer `prompts` of token ids: yield (number of a prompt, its next token) for each token of each answer.

    An answer ends with one of the tokens `eos`, which is yielded too, or after `sampling.max_new_tokens`. `max_batch`
    prompts are at work at once (0: all), and when one ends another takes its place. A prompt is fed `chunk` tokens at a
    time (None: as the backend is fastest; 0: all at once). What a prompt draws does not depend on the prompts beside
    it. `grammar` makes what each answer has to follow, and `speculation` is how tokens are guessed ahead, which changes
    none.

    Raises ConfigError for no prompt, an empty one, or a token outside the vocabulary, and what a backend raises.

    >>> import fope_export as fx
    >>> sampling = fx.SamplingParams(max_new_tokens=2)
    >>> answers = fx.generate(fx.load_backend("out"), [[72, 105], [33]], sampling)
    >>> sorted(number for number, token in answers)
    [0, 0, 1, 1]
    """
    for number, _, token in _answers(backend, prompts, sampling, eos, chunk, max_batch, grammar, speculation):
        if token is not None:
            yield number, token


def _answers(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    eos: Tokens,
    chunk: int | None,
    max_batch: int,
    grammar: Callable[[], Grammar | None],
    speculation: Speculation | None,
) -> Generator[tuple[int, Handle, int | None]]:
    """Tokens as they come, and None when a prompt's are over."""
    if not prompts:
        raise ConfigError("there is no prompt", hint="Give at least one.")
    room = max(map(len, prompts)) + min(sampling.max_new_tokens, AHEAD)
    slots = min(max_batch or len(prompts), len(prompts))
    with closing(Engine(backend, slots, room=room, chunk=chunk, budget=0, speculation=speculation)) as engine:
        ends = tokens_of(eos)
        left = {
            number: engine.submit(Request(prompt=prompt, sampling=sampling, ends=ends, grammar=grammar()))
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


def prefill_rows(slots: Slots, prompts: Ids, chunk: int) -> Logits:
    """Put prompts [B, S] into the first rows, up to `chunk` tokens at a time, and give each one's logits [B, V]."""
    count, length = prompts.shape
    size = chunk // length
    if size < 2 or not isinstance(slots, Together):
        return np.stack([prefill(slots, row, ids, chunk) for row, ids in enumerate(prompts)])
    pieces = [Piece(row, ids, 0) for row, ids in enumerate(prompts)]
    return np.concatenate([slots.prefill_together(pieces[i : i + size]) for i in range(0, count, size)])


def logits(backend: Backend, ids: Sequence[int], *, chunk: int | None = None) -> Logits:
    """Logits [S, V] after each of a sequence of token ids [S], which is fed `chunk` tokens at a time (None: as the
    backend is fastest; 0: all at once).

    Raises ConfigError for no token, and what a backend raises.

    >>> import fope_export as fx
    >>> fx.logits(fx.load_backend("out"), [72, 105, 33]).shape
    (3, 256)
    """
    if not len(ids):
        raise ConfigError("there is no token", hint="Give at least one.")
    size = (backend.chunk if chunk is None else chunk) or len(ids)
    with closing(backend.slots(1, len(ids))) as slots:
        starts = range(0, len(ids), size)
        return np.concatenate([slots.prefill(0, np.array(ids[i : i + size], np.int64), i, last=False) for i in starts])


def log_probabilities(backend: Backend, ids: Sequence[int], *, chunk: int | None = None) -> NDArray[np.float64]:
    """The logarithm of the probability, in nats, that a backend gives each of a sequence of token ids [S] after those
    before it: [S - 1], as the first has none before it. `chunk` and what is raised are as for `logits`.

    >>> import fope_export as fx
    >>> scores = fx.log_probabilities(fx.load_backend("out"), [72, 105, 33])
    >>> scores.shape, bool((scores < 0).all())
    ((2,), True)
    """
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
    grammar: Callable[[], Grammar | None] = lambda: None,
    speculation: Speculation | None = None,
    ended: Callable[[int, Handle], None] = lambda number, handle: None,
) -> Iterator[tuple[int, str]]:
    """Answer `prompts` of text: yield (number of a prompt, text that became certain, perhaps none) for every token.

    `text` is the tokenizer of the bundle that `backend` runs. An answer ends before one of the strings `stop`, with one
    of the tokens `eos` (None: those that the bundle names), which is not shown, or after `sampling.max_new_tokens`.
    With `special`, prompts get the tokens that the tokenizer puts around every text. `chunk`, `max_batch`, `grammar`
    and `speculation` are as for `generate`, and so is what is raised; ConfigError also for an empty `stop`, and a
    prompt that is no text. `ended` is told when an answer is over.

    >>> import fope_export as fx
    >>> text, backend = fx.Tokenizer("out"), fx.load_backend("out")
    >>> pieces = fx.generate_text(backend, text, ["def "], fx.SamplingParams(max_new_tokens=2))
    >>> {number for number, piece in pieces}
    {0}
    """
    ends = text.ends if eos is None else tokens_of(eos)
    streams = [text.stream(stop) for _ in prompts]
    encoded = [text.encode(prompt, special=special) for prompt in prompts]
    for number, handle, token in _answers(backend, encoded, sampling, ends, chunk, max_batch, grammar, speculation):
        stream = streams[number]
        if token is None:
            ended(number, handle)
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
