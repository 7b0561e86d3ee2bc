"""The next token of each row, greedy or drawn: the same for a prompt whatever stands beside it."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fope_export.config import Checked, Count, Size

BITS = 53
"""Of a random number, as many as a float64 holds."""


class Sampling(Checked, frozen=True, kw_only=True):
    """How the next token is drawn. The default is greedy; with a temperature, equal seeds give equal prompts equal
    texts.
    """

    max_new_tokens: Count = 128
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    top_k: Size = 0
    """Draw from the k likeliest tokens only; 0 means all."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Draw from the fewest tokens whose probabilities reach p."""
    seed: Size = 0


def sample(logits: NDArray[Any], sampling: Sampling, places: Sequence[int], choice: int = 0) -> list[int]:
    """A token for each row of logits [B, V]: the largest without a temperature; else drawn after top-k, then top-p.

    `places` [B] are the positions that the tokens will have, and `choice` tells answers to one prompt apart. The random
    numbers are those of (seed, choice, place), one for each token of the vocabulary: a draw depends on nothing else,
    and two nearly equal candidates that change places change nothing (Gumbel's maximum: the largest of log p + noise
    is a draw from p).
    """
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(axis=-1)]
    return [_draw(row, sampling, place, choice) for row, place in zip(logits, places, strict=True)]


def _draw(logits: NDArray[Any], sampling: Sampling, place: int, choice: int) -> int:
    candidates = _candidates(logits, sampling)
    scaled = _scaled(logits[candidates], sampling)
    return int(candidates[(scaled + _noise(sampling.seed, choice, place, len(logits))[candidates]).argmax()])


def _candidates(logits: NDArray[Any], sampling: Sampling) -> NDArray[np.intp]:
    """The tokens that may be drawn, by their ids."""
    size = len(logits)
    order = np.arange(size)
    if 0 < sampling.top_k < size:
        least = np.partition(logits, size - sampling.top_k)[size - sampling.top_k]
        order = np.flatnonzero(logits >= least)
    if sampling.top_p < 1:
        order = order[np.argsort(-logits[order], kind="stable")]
        weights = np.exp(_scaled(logits[order], sampling))
        kept = int(np.searchsorted(weights.cumsum() / weights.sum(), sampling.top_p)) + 1
        order = order[:kept]
    return order


def _scaled(logits: NDArray[Any], sampling: Sampling) -> NDArray[np.float64]:
    """Over the temperature, and the largest is 0: however small a temperature is, none overflows but downwards."""
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        scaled: NDArray[np.float64] = (wide - wide.max()) / sampling.temperature
    return scaled


def _noise(seed: int, choice: int, place: int, size: int) -> NDArray[np.float64]:
    """Gumbel noise [size], of a counter-based generator that is set to this place alone."""
    key = np.random.SeedSequence((seed, choice, place)).generate_state(2, np.uint64)
    drawn = np.random.Philox(key=key).random_raw(size) >> np.uint64(64 - BITS)
    uniform = (drawn.astype(np.float64) + 0.5) * 2.0**-BITS
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise
