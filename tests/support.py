"""What tests hold numbers by: the noise of the arithmetic, and no number that one processor happened to meet."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fope_export.backends.base import Backend, Feeds, Logits, Slots, feeds_for
from fope_export.backends.eager import EagerBackend
from fope_export.backends.stacked import Part, StackedSlots
from fope_export.fope import reference
from fope_export.fope.spectrum import Spectrum
from fope_export.generation import generate
from fope_export.model.decoder import Decoder
from fope_export.serving.sampling import SamplingParams

Array = NDArray[Any]
EPS = float(np.finfo(np.float32).eps)
FACTOR = 8
"""How many times the rounding errors of one evaluation may be those of another, and how often the unit in the last
place a few operations in a row may be off. In another order a sum of n terms errs up to √n times as much; most sums of
the models here have 64.
"""


class Forgetful:
    """A backend that only looks at a step's inputs: `answer` makes its logits of them."""

    name, chunk = "forgetful", 512

    def __init__(self, answer: Callable[[Feeds], Logits], vocab_size: int) -> None:
        self.answer, self.vocab_size = answer, vocab_size

    def empty_cache(self, batch: int) -> None:
        return None

    def assemble(self, parts: Sequence[Part]) -> None:
        return None

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:
        return StackedSlots(self, count)

    def close(self) -> None:
        """It has nothing."""

    def step(self, feeds: Feeds, cache: None, *, last: bool = False) -> tuple[Logits, None]:
        logits = self.answer(feeds)
        return logits[:, -1:] if last else logits, None


def answers(
    backend: Backend, prompts: Sequence[Sequence[int]], sampling: SamplingParams, **options: Any
) -> list[list[int]]:
    """What `generate` makes of each prompt."""
    sequences: list[list[int]] = [[] for _ in prompts]
    for number, token in generate(backend, prompts, sampling, **options):
        sequences[number].append(token)
    return sequences


def tokens(batch: int, length: int) -> NDArray[np.int64]:
    """Random bytes [B, S]."""
    return np.random.default_rng(0).integers(0, 256, (batch, length))


def truth_of(model: Decoder, ids: Array, mask: Array | None = None) -> Array:
    """A decoder's logits [B, S, V] in float64."""
    exact = EagerBackend.in_float64(model)
    return exact.step(feeds_for(ids, mask), exact.empty_cache(len(ids)))[0]


def same_function(got: ArrayLike, wanted: ArrayLike, truth: Array) -> None:
    """Hold two evaluations of one function by each other's error against `truth`: what one has and the other has not
    is no rounding. Both are of one precision, float32 or less.
    """
    errors = [float(abs(np.asarray(each, np.float64) - truth).max()) for each in (got, wanted)]
    unit = EPS * float(abs(truth).max())
    assert max(errors) <= FACTOR * (min(errors) + unit), f"errors of {errors} beside a unit of {unit:.2g}"


def close(got: ArrayLike, wanted: ArrayLike, *, eps: float = EPS) -> None:
    """Hold results of a few operations in a row by their largest number's unit in the last place."""
    one, other = np.asarray(got), np.asarray(wanted)
    np.testing.assert_allclose(one, other, rtol=0, atol=FACTOR * eps * abs(other).max())


def magnitude(numbers: Spectrum, x: Array, position_ids: Array) -> Array:
    """|left| * sum |cos * coef| + |right| * sum |sin * coef|, for each element of x [B, S, H, E]."""
    c, bases = numbers.config, reference.bases(numbers, position_ids)
    coefs = (numbers.sin_coef, c.sin_pad), (numbers.cos_coef, c.cos_pad)
    sums = []
    for basis, (coef, pad) in zip(bases, coefs, strict=True):
        table = np.full((*x.shape[:2], c.groups, c.rotary_dim // 2), abs(pad))
        table[..., : c.pairs] = np.einsum("bsj,gjf->bsgf", abs(basis), abs(coef).astype(np.float64))
        sums.append(np.repeat(table, x.shape[2] // c.groups, axis=2))
    size = abs(x.astype(np.float64))
    own = other = size[..., : c.rotary_dim]
    if c.pairing == "interleaved":
        sin, cos = (np.repeat(table, 2, axis=-1) for table in sums)
        other = other.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(own.shape)
    else:
        sin, cos = (np.concatenate((table, table), axis=-1) for table in sums)
        other = np.roll(other, c.rotary_dim // 2, axis=-1)
    size[..., : c.rotary_dim] = own * cos + other * sin
    return size


def rotated_within(
    got: ArrayLike, wanted: Array, numbers: Spectrum, x: Array, position_ids: Array, *, series: float, result: float
) -> None:
    """Hold a rotation by what its terms can lose in any order of summation: each term of the `series` and a few
    operations around it one unit in the last place, the `result` another. Both are an eps.
    """
    terms = numbers.config.rows + FACTOR
    allowed = (terms * series + result) * magnitude(numbers, x, position_ids)
    off = abs(np.asarray(got, np.float64) - wanted)
    assert (off <= allowed).all(), f"{(off / allowed).max():.2g} times what is allowed"
