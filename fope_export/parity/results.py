"""What a validation found, and why it failed where it did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fope_export.dtypes import FP32
from fope_export.parity.extended import Reach
from fope_export.parity.judge import LIMITS, ColumnVerdict, Measure, Verdict
from fope_export.parity.localize import Divergence
from fope_export.parity.quantized import Cost
from fope_export.validated import Tested

RATIOS = {
    "rms": "all tokens",
    "token": "worst token",
    "logit": "worst logit",
    "largest": "largest of all",
    "column": "one logit, all tokens",
}
"""Errors in units of rounding, which are judged."""
MODULE_RATIOS = RATIOS | {
    "rms": "all rows",
    "token": "worst row",
    "logit": "worst value",
    "column": "one column, all rows",
}
"""The same of a module."""


@dataclass(frozen=True)
class CaseResult:
    """One comparison."""

    name: str
    length: int
    positions: tuple[int, int] | None
    """First and last; a module has its own."""
    steps: int
    compared: int
    verdict: Verdict
    own: Measure
    """PyTorch's errors: those of one member."""
    seconds: float
    """That the bundle took to run it."""
    rounded: bool = False
    """Whether linear layers rounded their inputs here, other than in the other cases."""


@dataclass(frozen=True)
class ColumnResult:
    """Each logit over all tokens of one file's cases."""

    name: str
    verdict: ColumnVerdict


@dataclass(frozen=True)
class ControlResult:
    """One deliberate mistake. `skipped` says why this model cannot show it; else `verdict` must be a failure."""

    name: str
    skipped: str
    verdict: Verdict | None

    @property
    def passed(self) -> bool:
        return self.verdict is None or not self.verdict.passed


@dataclass(frozen=True)
class Place:
    """Where a failed bundle differs from its checkpoint."""

    divergence: Divergence | None
    tensors: tuple[str, ...]
    """Tensors with other values."""
    rotations: tuple[str, ...]
    """Modules whose rotation has other settings."""


class Check(NamedTuple):
    """Something that was checked, and why it failed, or nothing; two may have one name."""

    name: str
    reason: str
    seconds: float = 0.0
    """That the bundle ran for it."""


@dataclass(frozen=True)
class ParityResult:
    """What validation found. `passed` is everything together."""

    backend: str
    cases: tuple[CaseResult, ...]
    controls: tuple[ControlResult, ...]
    damaged: dict[str, str]
    """Files that are not what they should be, with the reason."""
    broken: str
    """Why the backend could not load or run the graph, or nothing; the cases end there."""
    place: Place | None
    """Looked for after a failure only."""
    cost: Cost | None = None
    """What quantization costs. The cases are then compared with PyTorch on the weights that the file holds."""
    caches: tuple[Cost, ...] = ()
    """What rounding keys and values costs, in each backend that does."""
    reach: Reach | None = None
    """What extending did to the loss by length; stated, and not judged."""
    dtype: str = FP32.precision
    """Of PyTorch, whose rounding is the yardstick."""
    allowance: float = 1.0
    """How many times PyTorch's rounding the file's operators are known to cost; the limits are in units of that."""
    columns: tuple[ColumnResult, ...] = ()
    tested: tuple[Tested, ...] = ()
    seconds: float = 0.0
    """That it took."""

    @property
    def ratio_labels(self) -> dict[str, str]:
        """What the ratios are called; a module's cases have no positions."""
        return MODULE_RATIOS if any(case.positions is None for case in self.cases) else RATIOS

    @property
    def checks(self) -> list[Check]:
        """Everything that was checked."""
        labels = self.ratio_labels
        checks = [Check(f"case: {each.name}", why(each.verdict, labels), each.seconds) for each in self.cases]
        checks += [Check(f"every column: {each.name}", why(each.verdict, labels)) for each in self.columns]
        checks += [
            Check(f"control: {each.name}", "" if each.passed else "a wrong model passed") for each in self.controls
        ]
        if self.cost:
            checks += [Check(f"quantization: {self.cost.kind}", "; ".join(self.cost.failed))]
        checks += [Check(f"cache: {each.kind}", "; ".join(each.failed)) for each in self.caches]
        files = "; ".join(f"{name} {reason}" for name, reason in self.damaged.items())
        ran = self.broken or ("" if self.cases else "it ran no case")
        return [*checks, Check("backend", ran), Check("files", files)]

    @property
    def failures(self) -> list[str]:
        """What failed, and why."""
        return [f"{each.name}: {each.reason}" for each in self.checks if each.reason]

    @property
    def passed(self) -> bool:
        return not self.failures


def joined(results: Sequence[ParityResult]) -> ParityResult:
    """Those of one bundle in several backends as one; what another than the first did is called after it."""
    first, *others = results
    if not others:
        return first

    def named(field: str) -> tuple[Any, ...]:
        more = ((each, x) for each in others for x in getattr(each, field))
        return (*getattr(first, field), *(replace(x, name=f"{x.name}, {each.backend}") for each, x in more))

    return replace(
        first,
        cases=named("cases"),
        controls=named("controls"),
        columns=named("columns"),
        caches=tuple(each for result in results for each in result.caches),
        backend=", ".join(each.backend for each in results),
        broken="; ".join(f"{each.backend}: {each.broken}" for each in results if each.broken),
        place=next((each.place for each in results if each.place), None),
        dtype=", ".join(dict.fromkeys(each.dtype for each in results)),
        tested=tuple(tested for each in results for tested in each.tested),
    )


def why(verdict: Verdict | ColumnVerdict, labels: Mapping[str, str]) -> str:
    """What is too large, in words; empty where nothing is."""
    if isinstance(verdict, ColumnVerdict):
        name = f"{labels['column']}, number {verdict.logit}"
        return "" if verdict.passed else f"{name}: {_short(verdict.ratio)} > {verdict.limit:g} times rounding"
    ratios, limits = verdict.ratios, verdict.limits
    return "; ".join(f"{labels[n]} {_short(ratios[n])} > {limits[n]:g} times rounding" for n in verdict.failed)


def _short(value: float) -> str:
    return f"{value:.2g}"


assert set(RATIOS) == set(MODULE_RATIOS) == set(LIMITS)
