"""Validation of a bundle: cases, controls, integrity, and the place of the first difference, as one result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fope_export.backends.base import Backend, Feeds
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.errors import ParityError
from fope_export.model.checkpoint import source_of
from fope_export.model.decoder import Decoder
from fope_export.parity.cases import Case, prefill, standard_cases
from fope_export.parity.controls import CONTROLS, Control
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

    Raises BundleError when the checkpoint is gone or is another one, BackendError when the backend cannot run, and
    ParityError when it is PyTorch itself.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=False)
    source = source_of(bundle, checkpoint)
    tested = load_backend(bundle, backend)
    if isinstance(tested, EagerBackend):
        raise ParityError("PyTorch is the yardstick; it proves nothing about itself", hint="Use --backend onnxruntime.")
    yardstick = Yardstick(EagerBackend(source.model), EagerBackend.in_float64(source.model))
    cases = cases or standard_cases(source.config, seed, lengths)
    total = len(cases) + len(CONTROLS)
    results = []
    for done, case in enumerate(cases):
        report(case.name, done, total)
        results.append(yardstick.compare(case, tested))
    controls = []
    reference = prefill(source.config, source.config.training_length, seed)
    for done, control in enumerate(CONTROLS, start=len(cases)):
        report(control.name, done, total)
        controls.append(yardstick.refuse(control, reference, source.model))
    report("files", total, total)
    damaged = bundle.damaged()
    failing = [case for case, result in zip(cases, results, strict=True) if not result.verdict.passed]
    tensors, divergence = [], None
    if failing or damaged:
        tensors = different_tensors(bundle, source.model)
        feeds = _excerpt(failing[0] if failing else reference)
        divergence = first_divergence(bundle, yardstick.single, yardstick.double, feeds)
    return ParityResult(tested.name, tuple(results), tuple(controls), damaged, tuple(tensors), divergence)


@dataclass(frozen=True)
class Yardstick:
    """PyTorch in the tested dtype, and in float64."""

    single: EagerBackend
    double: EagerBackend

    def compare(self, case: Case, tested: Backend) -> CaseResult:
        """Hold a backend against the truth of one case."""
        verdict = judge(case.run_plainly(self.double), case.run(self.single), got := case.run(tested))
        return CaseResult(case.name, case.length, case.positions, len(case.steps), len(got), verdict)

    def refuse(self, control: Control, case: Case, model: Decoder) -> ControlResult:
        """Hold a deliberate mistake against it, where `model` can make it."""
        if reason := control.reason(model.config.spectrum):
            return ControlResult(control.name, reason, None)
        with control.applied(model) as wrong:
            got = case.run(wrong)
        return ControlResult(control.name, "", judge(case.run_plainly(self.double), case.run(self.single), got))


def _excerpt(case: Case) -> Feeds:
    """The last tokens of a case's first row without padding, as whole sequences."""
    ids, mask, positions = (array[:1] for array in case.feeds)
    real = mask[0] != 0
    ids, positions = (array[:, real][:, -LOCALISED:] for array in (ids, positions))
    return Feeds(np.ascontiguousarray(ids), np.ones_like(ids), np.ascontiguousarray(positions))
