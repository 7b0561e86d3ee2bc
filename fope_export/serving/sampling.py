"""The next token of each row, greedy or drawn: the same for a prompt whatever stands beside it."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fope_export.config import Checked, Positive, Size
from fope_export.errors import BackendError, ConfigError

BITS = 53
"""Of a random number, as many as a float64 holds."""
FEW = 256
"""The likeliest tokens that are looked at first for `top_p`."""

Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class SamplingParams(Checked, frozen=True, kw_only=True):
    """How the next token is chosen, and how many there may be. By default it is the likeliest; with a `temperature`
    above 0 it is drawn, and equal prompts with equal seeds get equal texts.

    In this order: `logit_bias` is added to logits, by token id; `repetition_penalty` divides those above 0, and
    multiplies those below, of tokens in the prompt or the answer; `frequency_penalty` is taken from those of tokens in
    the answer, as often as they are there, and `presence_penalty` once. `temperature` divides them all. Then only the
    `top_k` likeliest tokens stay (0: all); of these the fewest whose probabilities reach `top_p`; of these what is at
    least `min_p` times as likely as the likeliest. An answer has at most `max_new_tokens`, and does not end before it
    has `min_new_tokens`.

    Raises ConfigError for a value that is not allowed.

    >>> import fope_export as fx
    >>> fx.SamplingParams(temperature=0.8, top_p=0.95, seed=7).max_new_tokens
    128
    """

    max_new_tokens: Size = 128
    min_new_tokens: Size = 0
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    top_k: Size = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Probability = 0.0
    repetition_penalty: Positive = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0

    def check(self, vocab_size: int) -> None:
        """Raises ConfigError where `logit_bias` names a token that a vocabulary of `vocab_size` does not have, or adds
        a number that is not finite.
        """
        for token, bias in self.logit_bias.items():
            if not (0 <= token < vocab_size and math.isfinite(bias)):
                raise ConfigError(
                    f"logit_bias adds {bias} to token {token}, expected a finite number and one of {vocab_size} tokens",
                    hint="Leave it out.",
                )


class Draw(NamedTuple):
    """What one row's next token depends on beside its logits."""

    sampling: SamplingParams
    place: int
    """The position that the token will have."""
    choice: int = 0
    """Tells answers to one prompt apart."""
    prompt: Sequence[int] | NDArray[np.int64] = ()
    """Its tokens, each at least once."""
    made: Mapping[int, int] = {}
    """How often each token is in the answer so far."""
    allowed: NDArray[np.bool_] | None = None
    """Of each token of the vocabulary, whether it may come; None allows all."""


def sample(logits: NDArray[Any], draws: Sequence[Draw]) -> list[int]:
    """A token for each row of logits [B, V]: the largest without a temperature, else drawn.

    The random numbers are those of (seed, choice, place), one for each token of the vocabulary: a draw depends on
    nothing else, and two nearly equal candidates that change places change nothing (of exponential clocks with rates p,
    which is first is a draw from p; Gumbel's maximum, log p + noise, is the logarithm of that).
    """
    best = logits.argmax(axis=-1)
    return [_next(row, draw, int(largest)) for row, draw, largest in zip(logits, draws, best, strict=True)]


def _next(logits: NDArray[Any], draw: Draw, largest: int) -> int:
    changed = adjusted(logits, draw)
    if changed is not logits:
        largest = int(changed.argmax())
    if math.isnan(changed[largest]):
        raise BackendError(
            "the model gives logits that are no numbers", hint="`fope-export validate` shows where they come from."
        )
    return largest if draw.sampling.temperature == 0 else _drawn(changed, draw, float(changed[largest]))


def adjusted(logits: NDArray[Any], draw: Draw) -> NDArray[Any]:
    """The logits [V] after bias and penalties, minus infinity where a token may not come; themselves where nothing is
    asked for. Raises BackendError where none may come.
    """
    sampling = draw.sampling
    repeats = sampling.repetition_penalty != 1 and (len(draw.prompt) or draw.made)
    counted = draw.made if sampling.presence_penalty or sampling.frequency_penalty else {}
    if not (repeats or counted or sampling.logit_bias or draw.allowed is not None):
        return logits
    changed = logits.astype(np.float64)
    for token, bias in sampling.logit_bias.items():
        changed[token] += bias
    if repeats:
        seen = np.union1d(np.asarray(draw.prompt, np.int64), np.fromiter(draw.made, np.int64))
        factor = sampling.repetition_penalty
        changed[seen] = np.where(changed[seen] > 0, changed[seen] / factor, changed[seen] * factor)
    if counted:
        tokens, counts = (np.fromiter(each, np.int64) for each in (counted.keys(), counted.values()))
        changed[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if draw.allowed is not None:
        if not draw.allowed.any():
            raise BackendError("no token may come next", hint="The grammar and the logit_bias exclude each other.")
        changed[~draw.allowed] = -np.inf
    return changed


def _drawn(logits: NDArray[Any], draw: Draw, largest: float) -> int:
    sampling = draw.sampling
    candidates = _likeliest(logits, sampling.top_k)
    scaled = _scaled(logits[candidates], largest, sampling.temperature)
    kept = _reaching(scaled, sampling.top_p)
    if sampling.min_p:
        kept = kept[scaled[kept] >= math.log(sampling.min_p)]
    candidates = candidates[kept]
    with np.errstate(divide="ignore"):
        times = _waits(draw, len(logits), candidates) / np.exp(scaled[kept])
    return int(candidates[times.argmin()])


def _scaled(logits: NDArray[Any], largest: float, temperature: float) -> NDArray[np.float64]:
    """Over the temperature, and the largest is 0: however small a temperature is, none overflows but downwards."""
    with np.errstate(over="ignore"):
        scaled: NDArray[np.float64] = (logits.astype(np.float64) - largest) / temperature
    return scaled


def _likeliest(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Places of the `count` largest values, and of others that equal the least of them, in their order; 0 is all."""
    size = len(values)
    if not 0 < count < size:
        return np.arange(size)
    return np.flatnonzero(values >= np.partition(values, size - count)[size - count])


def _reaching(scaled: NDArray[np.float64], share: float) -> NDArray[np.intp]:
    """Places of the fewest tokens whose probabilities reach `share`."""
    if share == 1:
        return np.arange(len(scaled))
    total, few = np.exp(scaled).sum(), FEW
    while True:
        top = _likeliest(scaled, few)
        top = top[np.argsort(-scaled[top], kind="stable")]
        reached = np.exp(scaled[top]).cumsum() / total
        if reached[-1] >= share or few >= len(scaled):
            return top[: int(np.searchsorted(reached, share)) + 1]
        few *= 8


def _waits(draw: Draw, size: int, tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    """Exponential random numbers of some of `size` tokens, of a counter-based generator set to this place alone."""
    key = np.random.SeedSequence((draw.sampling.seed, draw.choice, draw.place)).generate_state(2, np.uint64)
    raw = np.random.Philox(key=key).random_raw(size)[tokens] >> np.uint64(64 - BITS)
    waits: NDArray[np.float64] = -np.log((raw.astype(np.float64) + 0.5) * 2.0**-BITS)
    return waits
