"""The measures and the rule: the error of every token and every logit, as a multiple of what rounding does to it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fope_export.errors import ParityError

LIMITS = {"rms": 2.5, "token": 20.0, "logit": 20.0, "largest": 4.5, "column": 2.5}
"""How many times the rounding an error may be: pooled over a case, of one token, of one token's worst logit, of all
logits of a case (the largest error against the largest that rounding makes anywhere in it), and of one logit pooled
over all cases. A new order of summation costs about 1; README says how they were measured.
"""
MEMBERS, MORE = 8, 56
"""Copies of PyTorch that show the rounding, and how many join them before a refusal is spoken."""
ENOUGH = 64
"""Tokens that make a mean; where there are fewer, the missing ones count as if they were right, and the largest error,
which is then one of few, by the same share.
"""
CLEAR = 10.0
"""Times a limit from which on a refusal is beyond doubt: eight times as many members cannot lift it."""
LAST = 0.5
"""Of a dtype's eps: the most that rounding a result itself costs, as a share of it."""

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
class Noise:
    """What rounding does to each token and each logit of one case: mean squares of the members' errors.

    None is below what rounding the results themselves may cost, so that results which happen to be exact in PyTorch
    need not be exact elsewhere.
    """

    members: int
    tokens: Floats
    """[N], of all of a token's logits together."""
    peaks: Floats
    """[N], of a token's worst logit."""
    largest: float
    """Of the case's worst logit."""
    columns: Floats
    """[V], of a logit over all tokens, each in units of the token's own noise."""
    weights: Floats
    """[N], one over that noise as the first members showed it."""
    eps: float
    allowance: float

    @classmethod
    def of(cls, truth: Floats, members: Sequence[Floats], eps: float, allowance: float = 1.0) -> Self:
        """From logits [N, V]: `truth` in float64, `members` in the arithmetic that is judged, whose numbers are `eps`
        apart. An operator is known to round `allowance` times as much as PyTorch's.

        Raises ParityError where they are not finite.
        """
        tokens = np.mean([_finite(_squares(truth, got)).sum(axis=1) for got in members], axis=0)
        tokens = np.maximum(tokens, _least(truth, eps).sum(axis=1))
        weights = np.divide(1.0, tokens, out=np.zeros_like(tokens), where=tokens > 0)
        nothing, columns = np.zeros_like(tokens), np.zeros(truth.shape[1])
        return cls(0, nothing, nothing, 0.0, columns, weights, eps, allowance).joined(truth, members)

    def joined(self, truth: Floats, members: Iterable[Floats]) -> Self:
        """With more members. Raises ParityError where they are not finite."""
        count = self.members
        known = (self.tokens, self.peaks, self.largest, self.columns)
        tokens, peaks, largest, columns = (count * each for each in known)
        for got in members:
            squares = _finite(_squares(truth, got))
            tokens, peaks = tokens + squares.sum(axis=1), peaks + squares.max(axis=1)
            largest, columns, count = largest + squares.max(), columns + self.weights @ squares, count + 1
        least = _least(truth, self.eps)
        return replace(
            self,
            members=count,
            tokens=np.maximum(tokens / count, least.sum(axis=1)),
            peaks=np.maximum(peaks / count, least.max(axis=1)),
            largest=max(largest / count, least.max()),
            columns=np.maximum(columns / count, self.weights @ least),
        )

    def ratios(self, truth: Floats, got: Floats) -> dict[str, float]:
        """The errors of `got` [N, V] in units of the noise: pooled, of the worst token, of the worst token's logit, of
        the worst logit of all.
        """
        squares = _squares(truth, got)
        tokens, peaks = _over(squares.sum(axis=1), self.tokens), _over(squares.max(axis=1), self.peaks)
        rms = np.sqrt(np.square(tokens).sum() / max(len(tokens), ENOUGH))
        largest = _over(squares.max(), np.asarray(self.largest)) * np.sqrt(min(len(tokens) / ENOUGH, 1))
        found = {"rms": rms, "token": tokens.max(), "logit": peaks.max(), "largest": largest}
        return {name: float(ratio) / self.allowance for name, ratio in found.items()}

    def tied(self) -> Floats:
        """[N] errors of a logit that the rule allows."""
        allowed: Floats = LIMITS["logit"] * self.allowance * np.sqrt(self.peaks)
        return allowed


def _squares(truth: Floats, got: Floats) -> Floats:
    """Squared errors [N, V]."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares: Floats = np.square(np.subtract(got, truth, dtype=np.float64))
    return squares


def _finite(squares: Floats) -> Floats:
    if not np.isfinite(squares).all():
        raise ParityError("PyTorch itself gives values that are not finite", hint="The model cannot be validated.")
    return squares


def _least(truth: Floats, eps: float) -> Floats:
    """Squares [N, V] of what rounding the values themselves may cost."""
    least: Floats = np.square(LAST * eps * truth)
    return least


def _over(squares: Floats, noise: Floats) -> Floats:
    """Roots of the quotients. No error is 0, whatever the noise; an error where nothing can round is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients: Floats = np.sqrt(np.divide(squares, noise, out=np.zeros_like(squares), where=squares != 0))
    return quotients


@dataclass(frozen=True)
class Columns:
    """Squared errors [V] of each logit, added over tokens in units of their noise: a backend's, and the noise."""

    got: Floats
    noise: Floats
    tokens: int


@dataclass(frozen=True)
class Verdict:
    """A backend's errors in one case, in units of rounding, beside their limits."""

    got: Measure
    ratios: dict[str, float]
    limits: dict[str, float]
    members: int
    """How many showed the rounding."""
    columns: Columns = field(repr=False, compare=False)

    @property
    def failed(self) -> tuple[str, ...]:
        """The ratios over their limits. A value that is not a number is over every limit."""
        return over(self.ratios, self.limits)

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def ratio(self) -> float:
        """The root mean square error as a multiple of rounding's."""
        return self.ratios["rms"]


def over(ratios: Mapping[str, float], limits: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the ratios that are not within their limits."""
    return tuple(name for name, ratio in ratios.items() if not ratio <= limits[name])


def judge(truth: Floats, noise: Noise, got: Floats, again: Callable[[], Noise] | None = None) -> Verdict:
    """Hold a backend's logits [N, V] of one case against the truth. `again` gives the noise of more members, which a
    refusal is judged by once more where they could lift it.
    """
    verdict = _judged(truth, noise, got)
    return _judged(truth, again(), got) if again and _doubtful(verdict.ratios, verdict.limits) else verdict


def _judged(truth: Floats, noise: Noise, got: Floats) -> Verdict:
    found, ratios = measure(truth, got, noise.tied()), noise.ratios(truth, got)
    with np.errstate(invalid="ignore"):
        sums = noise.weights @ _squares(truth, got)
    columns = Columns(sums, noise.columns * noise.allowance**2, len(truth))
    return Verdict(found, ratios, {name: LIMITS[name] for name in ratios}, noise.members, columns)


def _doubtful(ratios: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether more members could turn a refusal: a limit is missed, and none by far."""
    failed = over(ratios, limits)
    return bool(failed) and all(ratios[name] < CLEAR * limits[name] for name in failed)


@dataclass(frozen=True)
class ColumnVerdict:
    """Each logit over all tokens of all cases: an error that few weights of the last layer make shows here first."""

    ratio: float
    logit: int
    """The worst."""
    limit: float
    members: int

    @property
    def passed(self) -> bool:
        return self.ratio <= self.limit


def judge_columns(verdicts: Sequence[Verdict], again: Callable[[], Sequence[Noise]] | None = None) -> ColumnVerdict:
    """Pool what the verdicts of one file's cases say of each logit; `again` gives their noises with more members."""
    verdict = _pooled([each.columns for each in verdicts], min(each.members for each in verdicts))
    if not again or not _doubtful({"column": verdict.ratio}, {"column": verdict.limit}):
        return verdict
    noises = again()
    columns = [
        replace(each.columns, noise=noise.columns * noise.allowance**2)
        for each, noise in zip(verdicts, noises, strict=True)
    ]
    return _pooled(columns, min(noise.members for noise in noises))


def _pooled(found: Sequence[Columns], members: int) -> ColumnVerdict:
    got, noise = (np.sum([getattr(each, side) for each in found], axis=0) for side in ("got", "noise"))
    missing = max(ENOUGH - sum(each.tokens for each in found), 0) / len(got)
    ratios = _over(got + missing, noise + missing)
    worst = int(ratios.argmax())
    return ColumnVerdict(float(ratios[worst]), worst, LIMITS["column"], members)
