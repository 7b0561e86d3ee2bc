"""Generation on any backend: prompts in, tokens out, one step at a time."""

from collections import Counter, deque
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, Feeds, Ids, Logits, Part, feeds_for, widest
from fope_export.config import Tokens, tokens_of
from fope_export.errors import ConfigError
from fope_export.sampling import Draw, Sampling, sample
from fope_export.tokens import Text

SHARED = 16
"""Tokens that all prompts must begin with for these to be fed only once."""
AHEAD = 1024
"""New tokens that caches have room for at once: answers may be allowed to be far longer than they become."""


@dataclass
class _Sequence:
    """A prompt at work."""

    number: int
    prompt: Ids
    """Its different tokens."""
    place: int
    """Position of the next token."""
    left: int
    """Tokens that it may still make."""
    logits: NDArray[Any]
    """[V], of its last token."""
    part: Part
    """Where its tokens are."""
    made: Counter[int] = field(default_factory=Counter)
    """How often it has made each token."""


def generate(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos: Tokens = None,
    chunk: int | None = None,
    max_batch: int = 0,
) -> Generator[list[int | None], Collection[int] | None]:
    """Yield one token for each prompt and step; None for a prompt that has met one of `eos` (which itself is yielded),
    or that still waits.

    `max_batch` prompts are at work at once (0: all), and when one ends another takes its place. Each is fed alone, and
    what all begin with only once; then they go on together, padded on the left. `chunk` is as for `prefill`. What a
    prompt draws does not depend on the prompts beside it (`sampling.sample`). Send a list of numbers to end those
    prompts early.

    Raises ConfigError for an empty prompt, or a bias of a token that there is not.
    """
    if not prompts or not all(prompts):
        raise ConfigError("a prompt is empty", hint="Every prompt needs at least one token.")
    sampling.check(backend.vocab_size)
    ends = tokens_of(eos)
    room = max(map(len, prompts)) + min(sampling.max_new_tokens, AHEAD)
    shared = _shared(prompts)
    _, prefix = prefill(backend, _alone(prompts[0][:shared]), chunk) if shared else (None, None)

    def start(number: int) -> _Sequence:
        cache = backend.assemble([Part(prefix, 0, 0, shared)], room) if shared else backend.empty_cache(1, room)
        logits, cache = prefill(backend, _alone(prompts[number]), chunk, cache, shared)
        length = len(prompts[number])
        return _Sequence(
            number,
            np.unique(prompts[number]),
            length,
            sampling.max_new_tokens,
            logits[0, -1],
            Part(cache, 0, 0, length),
        )

    waiting, working = deque(range(len(prompts))), list[_Sequence]()
    while waiting or working:
        while waiting and len(working) < (max_batch or len(prompts)):
            working.append(start(waiting.popleft()))
        draws = [Draw(sampling, each.place, 0, each.prompt, each.made) for each in working]
        drawn = sample(np.stack([each.logits for each in working]), draws)
        chosen = dict(zip((each.number for each in working), drawn, strict=True))
        ended = (yield [chosen.get(number) for number in range(len(prompts))]) or ()
        waiting = deque(number for number in waiting if number not in ended)
        for each in working:
            each.left, each.place = each.left - 1, each.place + 1
            each.made[chosen[each.number]] += 1
        before = len(working)
        working = [
            each for each in working if each.left and chosen[each.number] not in ends and each.number not in ended
        ]
        if working:
            _advance(backend, working, [chosen[each.number] for each in working], before, room)


def _advance(backend: Backend, working: Sequence[_Sequence], tokens: Sequence[int], before: int, room: int) -> None:
    """Feed each sequence its token. `before` is how many there were in the last step: with as many now, in one cache,
    nobody came or left.
    """
    cache = working[0].part.cache
    if len(working) < before or any(each.part.cache is not cache for each in working):
        parts = [each.part for each in working]
        cache, width = backend.assemble(parts, room), widest(parts)
        for row, each in enumerate(working):
            each.part = Part(cache, row, width - (each.part.end - each.part.start), width)
    total = working[0].part.end + 1
    mask = np.arange(total) >= np.array([[each.part.start] for each in working])
    ids = np.array(tokens, np.int64)[:, None]
    logits, cache = backend.step(feeds_for(ids, mask.astype(np.int64)), cache, last=True)
    for row, each in enumerate(working):
        each.logits, each.part = logits[row, -1], Part(cache, row, each.part.start, total)


def _alone(prompt: Sequence[int]) -> Feeds:
    return feeds_for(np.array([prompt], np.int64))


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all of several prompts begin with, and have more of; 0 where they are too few to matter."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    longest = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
    same = next((i for i in range(longest) if first[i] != last[i]), longest)
    return same if same >= SHARED else 0


def prefill(
    backend: Backend, feeds: Feeds, chunk: int | None = None, cache: Any = None, start: int = 0
) -> tuple[Logits, Any]:
    """Feed a prompt, but for the `start` tokens that `cache` already has; the last token's logits [B, 1, V], and the
    cache. `chunk` tokens are fed at a time: 0 is all, None what suits the backend.
    """
    rows, length = feeds.input_ids.shape
    cache = backend.empty_cache(rows, length) if cache is None else cache
    size = (backend.chunk if chunk is None else chunk) or length
    for begin in range(start, length, size):
        logits, cache = backend.step(feeds.part(begin, begin + size), cache, last=True)
    return logits, cache


def complete(
    backend: Backend,
    text: Text,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    eos: Tokens = None,
    chunk: int | None = None,
    max_batch: int = 0,
    special: bool = True,
) -> Iterator[tuple[int, str]]:
    """Yield (number of a prompt, text that became certain, perhaps none) for every token.

    A text ends with one of the tokens `eos` (None: those that the bundle names), and before a `stop` string. `special`
    is as for `Text.encode`.
    """
    ends = text.ends if eos is None else tokens_of(eos)
    streams = [text.stream(stop) for _ in prompts]
    encoded = [text.encode(prompt, special=special) for prompt in prompts]
    steps = generate(backend, encoded, sampling, eos=ends, chunk=chunk, max_batch=max_batch)
    tokens = next(steps, None)
    while tokens is not None:
        for row, (token, stream) in enumerate(zip(tokens, streams, strict=True)):
            if token is not None and token not in ends and not stream.stopped:
                yield row, stream.push(token)
        try:
            tokens = steps.send([row for row, stream in enumerate(streams) if stream.stopped])
        except StopIteration:
            tokens = None
    for row, stream in enumerate(streams):
        if piece := stream.flush():
            yield row, piece


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Token ids and attention mask [B, longest], padded on the left with token 0."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
