"""Validation of a bundle: cases, controls, integrity, and the place of the first difference, as one result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fope_export.backends.base import Backend, Feeds
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.model.checkpoint import Checkpoint, source_of
from fope_export.parity.cases import Case, standard_cases
from fope_export.parity.controls import CONTROLS
from fope_export.parity.judge import Verdict, judge
from fope_export.parity.localise import Divergence, different_tensors, first_divergence

LOCALISED = 256
"""Tokens of a failing case that the search for the first difference looks at."""


@dataclass(frozen=True)
class CaseResult:
    """One comparison."""

    name: str
    length: int
    positions: tuple[int, int]
    steps: int
    compared: int
    verdict: Verdict


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
class ParityResult:
    """What validation found. `passed` is everything together."""

    backend: str
    cases: tuple[CaseResult, ...]
    controls: tuple[ControlResult, ...]
    damaged: dict[str, str]
    """Files that are not what the manifest records, with the reason."""
    tensors: tuple[str, ...]
    """Tensors of the checkpoint that the graph holds with other values; looked for after a failure only."""
    divergence: Divergence | None

    @property
    def passed(self) -> bool:
        verdicts = [case.verdict.passed for case in self.cases] + [control.passed for control in self.controls]
        return all(verdicts) and not self.damaged


def validate(
    bundle: str | Path | Bundle,
    *,
    checkpoint: str | Path | None = None,
    backend: str | None = None,
    lengths: Sequence[int] = (),
    seed: int = 0,
    cases: Sequence[Case] = (),
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ParityResult:
    """Compare a bundle with its checkpoint in PyTorch. `cases` replace the standard ones; `report` follows progress.

    Raises BundleError when the checkpoint is gone or is another one, BackendError when the backend cannot run.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=False)
    source = source_of(bundle, checkpoint)
    tested = load_backend(bundle, backend)
    single, double = EagerBackend(source.model), EagerBackend.in_float64(source.model)
    cases = cases or standard_cases(source.config, seed, lengths)
    todo = [case.name for case in cases] + [control.name for control in CONTROLS] + ["integrity"]
    progress = iter(enumerate(todo))

    def next_step() -> None:
        done, what = next(progress)
        report(what, done, len(todo))

    results = []
    for case in cases:
        next_step()
        results.append(_compare(case, single, double, tested))
    controls = []
    reference = _control_case(cases, source)
    for control in CONTROLS:
        next_step()
        reason = control.reason(source.config.spectrum)
        if reason:
            controls.append(ControlResult(control.name, reason, None))
            continue
        truth, noisy = reference.run_plainly(double), reference.run(single)
        with control.applied(source.model) as wrong:
            controls.append(ControlResult(control.name, "", judge(truth, noisy, reference.run(wrong))))
    next_step()
    damaged = bundle.damaged()
    failing = [case for case, result in zip(cases, results, strict=True) if not result.verdict.passed]
    tensors, divergence = [], None
    if failing or damaged:
        tensors = different_tensors(bundle, source.model)
        divergence = first_divergence(bundle, single, double, _excerpt(failing[0] if failing else reference))
    return ParityResult(tested.name, tuple(results), tuple(controls), damaged, tuple(tensors), divergence)


def _compare(case: Case, single: Backend, double: Backend, tested: Backend) -> CaseResult:
    truth, noisy, got = case.run_plainly(double), case.run(single), case.run(tested)
    verdict = judge(truth, noisy, got)
    return CaseResult(case.name, case.length, case.positions, len(case.steps), len(got), verdict)


def _control_case(cases: Sequence[Case], source: Checkpoint) -> Case:
    """The case nearest to the training length: long enough for every mistake to show."""
    return min(cases, key=lambda case: abs(case.length - source.config.training_length))


def _excerpt(case: Case) -> Feeds:
    """The last tokens of a case's first row without padding, as whole sequences."""
    ids, mask, positions = (array[:1] for array in case.feeds)
    real = mask[0] != 0
    ids, positions = (array[:, real][:, -LOCALISED:] for array in (ids, positions))
    return Feeds(np.ascontiguousarray(ids), np.ones_like(ids), np.ascontiguousarray(positions))
