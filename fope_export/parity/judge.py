"""The measure and the rule: a backend may be FACTOR times as far from float64 as PyTorch is in the tested dtype."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fope_export.errors import ParityError

FACTOR = 3.0
"""How many times PyTorch's own error a backend's error may be. Another order of summation costs about 1, unless it adds
without blocks (`quantised.factor_of`).
"""
FLOOR = 8 * float(np.finfo(np.float32).eps)
"""Errors below this share of the largest logit pass: for a few tokens PyTorch's own error is a matter of luck."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Measure:
    """How far logits [N, V] are from the truth. Zero is perfect; `flips` and `non_finite` are counts."""

    max_abs: float
    relative: float
    """Root mean square of the error over that of the truth."""
    cosine: float
    """1 - cosine of the two, over all logits together."""
    kl: float
    """Largest Kullback-Leibler divergence of a position's softmax from the true one, in nats."""
    flips: int
    """Positions with another likeliest token, although the true one leads it by more than rounding there explains."""
    non_finite: int


METRICS = tuple(f.name for f in fields(Measure))


def measure(truth: Floats, got: Floats, allowed: Floats | float) -> Measure:
    """Compare logits [N, V] in float64. `allowed` is the absolute error, of each position [N] or of all, that a near
    tie may excuse.

    Raises ParityError when there is nothing to compare or the shapes differ.
    """
    if truth.size == 0 or truth.shape != got.shape:
        raise ParityError(f"logits {got.shape} cannot be compared with {truth.shape}", hint="Give other inputs.")
    truth, got = truth.astype(np.float64), got.astype(np.float64)
    non_finite = int(got.size - np.isfinite(got).sum())
    if non_finite:
        worst = float("inf")
        return Measure(worst, worst, worst, worst, len(got), non_finite)
    error = got - truth
    norm, other = (np.linalg.norm(logits) or 1.0 for logits in (truth, got))
    best = truth.argmax(axis=1)
    rival = np.take_along_axis(truth, got.argmax(axis=1)[:, None], axis=1)[:, 0]
    lead = truth.max(axis=1) - rival
    return Measure(
        max_abs=float(np.abs(error).max()),
        relative=float(np.linalg.norm(error) / norm),
        # By the chord between unit vectors: 1 - a.b/(|a||b|) cancels, this does not.
        cosine=float(np.square(truth / norm - got / other).sum() / 2),
        kl=float(divergence(truth, got).max()),
        flips=int(((got.argmax(axis=1) != best) & (lead > 2 * allowed)).sum()),
        non_finite=0,
    )


def divergence(truth: Floats, got: Floats) -> Floats:
    """KL(softmax(truth) || softmax(got)) of each position as sum p (e^d - 1 - d), d = log q - log p: never negative."""
    p, q = log_softmax(truth), log_softmax(got)
    delta = q - p
    kl: Floats = (np.exp(p) * (np.expm1(delta) - delta)).sum(axis=1)
    return kl


def log_softmax(logits: Floats) -> Floats:
    """Logits [N, V] to logarithms of probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logarithms: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logarithms


@dataclass(frozen=True)
class Verdict:
    """A backend's measure beside PyTorch's own and the limits that follow from it."""

    got: Measure
    noise: Measure
    limits: dict[str, float]

    @property
    def failed(self) -> tuple[str, ...]:
        """The metrics over their limits. A value that is not a number is over every limit."""
        return tuple(name for name in METRICS if not getattr(self.got, name) <= self.limits[name])

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def ratio(self) -> float:
        """The backend's root mean square error as a multiple of PyTorch's."""
        got, noise = self.got.relative, self.noise.relative
        return got / noise if noise else float("inf") if got else 0.0


def limit(truth: Floats, noisy: Floats, factor: float = FACTOR) -> float:
    """The largest absolute error allowed, where PyTorch in the tested dtype gives `noisy`."""
    truth = truth.astype(np.float64)
    return max(factor * float(np.abs(noisy - truth).max()), FLOOR * float(np.abs(truth).max()))


def judge(truth: Floats, noisy: Floats, got: Floats, factor: float = FACTOR) -> Verdict:
    """`truth` in float64, `noisy` from PyTorch in the tested dtype, `got` from the backend: logits [N, V] each."""
    noise = measure(truth, noisy, allowed=0.0)
    if noise.non_finite:
        raise ParityError("PyTorch itself gives values that are not finite", hint="The model cannot be validated.")
    floor = FLOOR * float(np.abs(truth).max())
    relative = floor / float(np.sqrt(np.square(truth, dtype=np.float64).mean()))
    limits = {
        "max_abs": limit(truth, noisy, factor),
        "relative": max(factor * noise.relative, relative),
        "cosine": max(factor**2 * noise.cosine, relative**2 / 2),
        "kl": max(factor**2 * noise.kl, (2 * floor) ** 2 / 2),
        "flips": 0.0,
        "non_finite": 0.0,
    }
    near_tie = np.maximum(factor * np.abs(noisy - truth).max(axis=1), floor)
    return Verdict(measure(truth, got, near_tie), noise, limits)
