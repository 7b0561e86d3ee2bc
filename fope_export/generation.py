"""Generation on any backend: prompts in, tokens out, one step at a time."""

from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, Feeds, Ids, Logits, feeds_for
from fope_export.config import Checked, Count, Size
from fope_export.errors import ConfigError
from fope_export.tokens import Text


class Sampling(Checked, frozen=True, kw_only=True):
    """How the next token is drawn. The default is greedy; with a temperature, equal seeds give equal tokens."""

    max_new_tokens: Count = 128
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    top_k: Size = 0
    """Draw from the k likeliest tokens only; 0 means all."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Draw from the fewest tokens whose probabilities reach p."""
    seed: Size = 0


CHUNK = 512
"""Tokens of a prompt that are fed at once: attention over a chunk takes less time and memory than over the whole."""


def generate(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos: int | None = None,
    chunk: int = CHUNK,
) -> Generator[list[int | None], Collection[int] | None]:
    """Yield one token for each prompt and step; None for a prompt that has met `eos` (which itself is yielded).

    Prompts of different lengths are padded on the left. Each row draws with its own generator, from `seed` and its
    index, so that a prompt's text does not depend on the prompts beside it. Send a list of row numbers to end those
    rows early. Prompts are fed `chunk` tokens at a time; 0 feeds them whole.

    Raises ConfigError for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ConfigError("a prompt is empty", hint="Every prompt needs at least one token.")
    ids, mask = pad_left(prompts)
    rngs = [np.random.default_rng((sampling.seed, row)) for row in range(len(prompts))]
    done = np.zeros(len(prompts), bool)
    logits, cache = prefill(backend, feeds_for(ids, mask), chunk)
    for remaining in reversed(range(sampling.max_new_tokens)):
        chosen = [sample(row, sampling, rng) for row, rng in zip(logits[:, -1], rngs, strict=True)]
        ended = yield [None if over else token for token, over in zip(chosen, done, strict=True)]
        done |= np.array([token == eos for token in chosen])
        done[list(ended or ())] = True
        if done.all() or not remaining:
            return
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        logits, cache = backend.step(feeds_for(np.array(chosen, np.int64)[:, None], mask), cache)


def prefill(backend: Backend, feeds: Feeds, chunk: int = CHUNK) -> tuple[Logits, Any]:
    """Feed a whole prompt, `chunk` tokens at a time (0: at once); logits of the last chunk, and the cache."""
    cache, length = backend.empty_cache(len(feeds.input_ids)), feeds.input_ids.shape[1]
    for start in range(0, length, chunk or length):
        logits, cache = backend.step(feeds.part(start, start + (chunk or length)), cache)
    return logits, cache


def complete(
    backend: Backend,
    text: Text,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    eos: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, str]]:
    """Yield (number of a prompt, text that became certain, perhaps none) for every token; `stop` strings end it."""
    streams = [text.stream(stop) for _ in prompts]
    steps = generate(backend, [text.encode(prompt) for prompt in prompts], sampling, eos=eos, chunk=chunk)
    tokens = next(steps, None)
    while tokens is not None:
        for row, (token, stream) in enumerate(zip(tokens, streams, strict=True)):
            if token is not None and token != eos and not stream.stopped:
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


def sample(logits: NDArray[Any], sampling: Sampling, rng: np.random.Generator) -> int:
    """One token from logits [V]: the largest without a temperature; else drawn after top-k, then top-p."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    kept = int(np.searchsorted(weights.cumsum(), sampling.top_p)) + 1
    weights = weights[:kept] / weights[:kept].sum()
    return int(order[rng.choice(len(weights), p=weights)])
