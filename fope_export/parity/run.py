"""Validation of a bundle: cases, controls, integrity, and the place of the first difference, as one result."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from fope_export.backends.base import Backend, Feeds
from fope_export.backends.choose import BACKENDS, Settings, choose, load_backend, read_machine
from fope_export.backends.eager import EagerBackend
from fope_export.backends.ort import OrtBackend
from fope_export.backends.ort_optimised import OptimisedOrtBackend
from fope_export.bundle import MANIFEST, OPTIMISED, Bundle
from fope_export.config import ExportConfig
from fope_export.errors import BackendError, ParityError
from fope_export.graph.reading import check_graphs
from fope_export.model.checkpoint import Checkpoint, source_of
from fope_export.model.decoder import Decoder
from fope_export.parity.cases import Case, Floats, load_inputs, prefill, save_inputs, standard_cases
from fope_export.parity.controls import CONTROLS, FOLDED, Control
from fope_export.parity.extended import Reach, reach_of
from fope_export.parity.judge import FACTOR, Verdict, judge
from fope_export.parity.localise import Divergence, different_rotations, different_tensors, first_divergence
from fope_export.parity.quantised import Cost, cost_of, factor_of, place_weights, round_inputs

LOCALISED = 256
"""Tokens of a failing case that the search for the first difference looks at."""
LOCALISED_CASES = 3
"""Failing cases that it looks at, until one shows a difference."""
SHORTEST_CONTROL = 32
"""Tokens on which every deliberate mistake shows, however short the training length."""


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
    rounded: bool = False
    """Whether linear layers rounded their inputs here, other than in the other cases."""


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
    """What quantisation costs. The cases are then compared with PyTorch on the weights that the file holds."""
    reach: Reach | None = None
    """What extending did to the loss by length; stated, and not judged."""
    dtype: str = "float32"
    """Of PyTorch, whose error is the yardstick."""
    factor: float = FACTOR
    """How many times that error is allowed."""

    @property
    def passed(self) -> bool:
        verdicts = [case.verdict.passed for case in self.cases] + [control.passed for control in self.controls]
        affordable = self.cost is None or not self.cost.failed
        return bool(self.cases) and all(verdicts) and affordable and not self.damaged and not self.broken


def validate(
    bundle: str | Path | Bundle,
    *,
    checkpoint: str | Path | None = None,
    backend: str | None = None,
    lengths: Sequence[int] = (),
    seed: int = 0,
    load: Path | None = None,
    save: Path | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ParityResult:
    """Compare a bundle with its checkpoint in PyTorch, in the standard cases, with prefills of `lengths` if given.

    `load` replaces the cases by inputs saved as Polygraphy's JSON, `save` writes them; `report` follows progress.

    Raises BundleError when the checkpoint is gone or is another one, BackendError when no backend can run here, and
    ParityError when the backend is PyTorch itself, or when inputs or lengths make no sense.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=False)
    if (chosen := choose(backend, read_machine())) == "torch":
        raise ParityError("PyTorch is the yardstick; it proves nothing about itself", hint="Use --backend onnxruntime.")
    check_graphs(bundle)
    source, exported = source_of(bundle, checkpoint), bundle.manifest.export
    source.model.as_exported(exported)
    limits = BACKENDS[chosen].limits(bundle)
    cases = load_inputs(load, source.config) if load else standard_cases(source.config, seed, lengths, limits)
    if save:
        save_inputs(save, bundle.manifest, cases)
    single, double = EagerBackend(source.model), EagerBackend.in_float64(source.model)
    yardstick = Yardstick(single, double, factor_of(bundle, source.model))
    mistakes = (*CONTROLS, FOLDED) if exported.fold_padding else CONTROLS
    total = len(cases) + len(mistakes)
    reference = prefill(source.config, max(source.config.training_length, SHORTEST_CONTROL), seed)
    rounded: list[CaseResult] = []
    failing: list[Case] = []
    results, cost, reach, broken = [], None, None, ""
    try:
        used = load_backend(bundle, chosen)
        cost = _quantise(yardstick, bundle, used) if exported.quantize else None
        reach = reach_of(bundle, source_of(bundle, checkpoint).model, used) if exported.extend else None
        files, judging = _files(bundle, chosen), yardstick
        if exported.calibrated:
            rounded, judging, files[""] = _round(yardstick, bundle, files[""], reference)
        for done, case in enumerate(cases):
            report(case.name, done, total)
            compared = judging.compare(case, *files.values())
            results += [replace(each, name=case.name + which) for which, each in zip(files, compared, strict=True)]
            failing += [case] if any(not each.verdict.passed for each in compared) else []
    except BackendError as error:
        broken = str(error)
    folding = [_folding(source_of(bundle, checkpoint).model, exported, seed)] if exported.fold_padding else []
    controls = _refusals(mistakes, reference, yardstick, lambda name, done: report(name, len(cases) + done, total))
    damaged = bundle.damaged() | contradictions(bundle, source)
    found = ParityResult(
        chosen, (*folding, *rounded, *results), controls, damaged, broken, None, cost, reach,
        exported.precision, yardstick.factor,
    )  # fmt: skip
    if found.passed:
        return found
    searched = [] if broken else failing[:LOCALISED_CASES] or [reference]
    return replace(found, place=_place(bundle, source.model, yardstick, searched, cost))


def _files(bundle: Bundle, chosen: str) -> dict[str, Backend]:
    """What the cases are run on, by what it adds to their names: the portable file, and the optimised one if any."""
    found = {"": load_backend(bundle, chosen, Settings(optimised=False))}
    if chosen == "onnxruntime" and OPTIMISED in bundle.manifest.files:
        found[", optimised"] = OptimisedOrtBackend(bundle, exact=True)
    return found


@dataclass(frozen=True)
class Yardstick:
    """PyTorch in the tested dtype and in float64, and how many times the error of the one a backend may be off."""

    single: EagerBackend
    double: EagerBackend
    factor: float = FACTOR

    def judge(self, truth: Floats, noisy: Floats, got: Floats) -> Verdict:
        return judge(truth, noisy, got, self.factor)

    def compare(self, case: Case, *tested: Backend) -> list[CaseResult]:
        """Hold backends against the truth of one case."""
        truth, noisy = case.run_plainly(self.double), case.run(self.single)
        return [
            CaseResult(case.name, case.length, case.positions, len(case.steps), len(got), self.judge(truth, noisy, got))
            for got in map(case.run, tested)
        ]


def _folding(trained: Decoder, exported: ExportConfig, seed: int) -> CaseResult:
    """Hold PyTorch after folding against PyTorch before it, in float32."""
    model = trained.as_exported(msgspec.structs.replace(exported, dtype="fp32", fold_padding=False))
    case = prefill(model.config, max(model.config.training_length, SHORTEST_CONTROL), seed)
    yardstick = Yardstick(EagerBackend(copy.deepcopy(model)), EagerBackend.in_float64(model))
    model.fold_padding()
    return replace(yardstick.compare(case, EagerBackend(model))[0], name="folded against unfolded")


def _quantise(yardstick: Yardstick, bundle: Bundle, tested: Backend) -> Cost:
    """What quantisation costs, taken against the yardstick; which has the weights that the file holds from then on.

    The checkpoint's own model keeps its weights: it is what the file's other tensors are compared with.
    """
    cost = cost_of(bundle, yardstick.single.model, tested)
    yardstick.single.model = copy.deepcopy(yardstick.single.model)
    for backend in (yardstick.single, yardstick.double):
        place_weights(bundle, backend.model)
    return cost


def _round(
    yardstick: Yardstick, bundle: Bundle, tested: Backend, case: Case
) -> tuple[list[CaseResult], Yardstick, Backend]:
    """A comparison of the bundle that rounds its linear layers' inputs, and by what and on what the others are made.

    Which of two steps a number falls to is chance where the last digit decides, and one such flip outweighs all other
    errors: two computations that round are no measure of each other. So float64 does not round, and the noise is
    PyTorch's error with rounded inputs. As that hides small faults, ONNX Runtime does not round in the other cases.
    """
    model = copy.deepcopy(yardstick.single.model)
    round_inputs(bundle, model)
    rounding = Yardstick(EagerBackend(model), yardstick.double)
    if not isinstance(tested, OrtBackend):
        return [], rounding, tested
    compared = replace(rounding.compare(case, tested)[0], name=f"{case.name}, inputs rounded", rounded=True)
    return [compared], yardstick, OrtBackend(bundle, exact=True)


def _refusals(
    mistakes: Sequence[Control], case: Case, yardstick: Yardstick, report: Callable[[str, int], None]
) -> tuple[ControlResult, ...]:
    """What the rule says to deliberate mistakes in one case."""
    truth, noisy = case.run_plainly(yardstick.double), case.run(yardstick.single)
    found = []
    for done, control in enumerate(mistakes):
        report(control.name, done)
        found.append(_refuse(control, case, yardstick, truth, noisy))
    return tuple(found)


def _refuse(control: Control, case: Case, yardstick: Yardstick, truth: Floats, noisy: Floats) -> ControlResult:
    """Hold a deliberate mistake against the truth, where the model can make it."""
    if reason := control.reason(yardstick.single.model):
        return ControlResult(control.name, reason, None)
    with control.applied(yardstick.single.model) as wrong:
        return ControlResult(control.name, "", yardstick.judge(truth, noisy, case.run(wrong)))


def contradictions(bundle: Bundle, source: Checkpoint) -> dict[str, str]:
    """What the manifest says about the model and the checkpoint does not, as a reason against the manifest."""
    manifest = bundle.manifest
    spectra = [attention.rotary.spectrum.describe() for attention in source.model.attentions()]
    said = msgspec.to_builtins(manifest.decoder()) | {"spectra": manifest.spectra}
    known = msgspec.to_builtins(source.model.config) | {"spectra": spectra}
    wrong = [name for name, value in known.items() if said.get(name) != value]
    return {MANIFEST: f"contradicts the checkpoint in {', '.join(wrong)}"} if wrong else {}


def _place(bundle: Bundle, model: Decoder, yardstick: Yardstick, cases: Sequence[Case], cost: Cost | None) -> Place:
    try:
        tensors, rotations = different_tensors(bundle, model), different_rotations(bundle, model)
        tensors += cost.strays if cost else ()
        sticks = yardstick.single, yardstick.double
        found = (first_divergence(bundle, *sticks, _excerpt(case), yardstick.factor) for case in cases)
        return Place(next((each for each in found if each), None), tuple(tensors), tuple(rotations))
    except DecodeError:  # no ONNX file any more
        return Place(None, (), ())


def _excerpt(case: Case) -> Feeds:
    """The last tokens of a case, padding included, as whole sequences."""
    return Feeds(*(np.ascontiguousarray(array[:, -LOCALISED:]) for array in case.feeds))
