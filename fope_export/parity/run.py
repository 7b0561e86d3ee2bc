"""Validation of a bundle: cases, controls, integrity, and the place of the first difference, as one result."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import torch

from fope_export.backends.base import Backend, Feeds, axes_of
from fope_export.backends.choose import BACKENDS, USUALLY, Settings, Variant, able, choose
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import read_machine
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.dtypes import FP32
from fope_export.errors import BackendError, ParityError
from fope_export.manifest import MANIFEST, MODEL, plain_file
from fope_export.model.checkpoint import Checkpoint, source_of
from fope_export.model.conversion import ConvertedWeights
from fope_export.model.decoder import Decoder
from fope_export.onnx_files import check_graphs
from fope_export.parity.axes import with_image, with_images
from fope_export.parity.cached import Caches, caches_of
from fope_export.parity.cases import Case, load_inputs, prefill, save_inputs, standard_cases
from fope_export.parity.controls import AXES, CONTROLS, FOLDED, PHASES, Control
from fope_export.parity.copies import exact, portable
from fope_export.parity.disk import Given, given, moved_to_disk, on_disk
from fope_export.parity.extended import Reach, reach_of
from fope_export.parity.judge import MEMBERS, Noise, judge_columns
from fope_export.parity.localize import different_rotations, different_tensors, first_divergence
from fope_export.parity.quantized import Cost, allowance_of, cost_of, place_weights, round_inputs
from fope_export.parity.results import CaseResult, ColumnResult, ControlResult, ParityResult, Place, joined
from fope_export.parity.sparing import SparingYardstick
from fope_export.parity.yardstick import Look, Yardstick
from fope_export.validated import Tested

LOCALIZED = 256
"""Tokens of a failing case that the search for the first difference looks at."""
LOCALIZED_CASES = 3
"""Failing cases that it looks at, until one shows a difference."""
UNSEEN = 4
"""Times a dtype's eps: what a mistake changes in float64 that arithmetic of the dtype cannot show. A logit is rounded
by half of one eps at its end alone, and several times on its way.
"""
SHORTEST_CONTROL = 32
"""Tokens on which every deliberate mistake shows, however short the training length."""

Loading = Callable[[], Backend]


def validate(
    bundle: str | Path | Bundle,
    *,
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    backend: str | None = None,
    lengths: Sequence[int] = (),
    seed: int = 0,
    load: Path | None = None,
    save: Path | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ParityResult:
    """Run a bundle, and compare its logits with those of its checkpoint in PyTorch; `passed` of the result says whether
    every difference is one of rounding, and `failures` what is wrong.

    The cases are prefills of many lengths and steps with a cache; with `lengths`, in tokens, the prefills are of these
    instead. `seed` draws their tokens. `load` is a file with inputs, saved as Polygraphy's JSON, that are compared in
    the place of all these; `save` is one that the inputs are written to. `checkpoint` is the folder where the
    checkpoint is now (None: where it was exported from), `adapter` that of the adapter in it, and `backend` what runs
    the bundle (None: all that this machine runs it in, one after the other). `report` is told what is compared next,
    how many comparisons are done, and how many there are.

    Raises BundleError when the checkpoint is gone or is not the one that was exported, BackendError when the backend
    cannot run here, or not this bundle, and ParityError when it is PyTorch itself, when inputs cannot be read, when a
    length is not positive or has no room, or when the machine has not the memory for the checkpoint in float32:
    `validate_stages` needs that of a layer. OSError where the disk is full.

    >>> import fope_export as fx
    >>> result = fx.validate("out", lengths=(7,))
    >>> result.passed, result.failures
    (True, [])
    """
    bundle, machine = Bundle.of(bundle), read_machine()
    names = [choose(backend, machine, bundle.manifest.export)] if backend else able(bundle, machine)
    if "torch" in names:
        raise ParityError("PyTorch is the yardstick; it proves nothing about itself", hint="Use --backend onnxruntime.")
    for name in names:
        BACKENDS[name].variant(bundle)
    check_graphs(bundle)
    source = source_of(bundle, checkpoint, adapter)
    _check_memory(bundle, source)
    axes = axes_of(bundle.manifest)
    if axes and (load or save):
        raise ParityError("inputs with positions on several axes are neither saved nor loaded", hint="Leave that out.")
    results, started = list[ParityResult](), time.perf_counter()
    for name in names:
        limits = BACKENDS[name].limits(bundle)
        cases = load_inputs(load, source.config) if load else standard_cases(source.config, seed, lengths, limits)
        cases += with_images(cases, axes) if axes else []
        if save and not results:
            save_inputs(save, bundle.manifest, cases)
        results.append(_compared(bundle, source, name, cases, seed, report))
    return replace(joined(results), seconds=time.perf_counter() - started)


def memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(bundle: Bundle, source: Checkpoint) -> None:
    needed = sum(parameter.numel() for parameter in source.outline.parameters()) * torch.float32.itemsize
    if needed > (there := memory()):
        raise ParityError(
            f"{bundle.path} needs {needed / 1e9:,.0f} GB to be compared in float32, and this machine has "
            f"{there / 1e9:,.0f} GB",
            hint="`fope-export validate --stages` goes through it layer by layer.",
        )


def _compared(
    bundle: Bundle,
    source: Checkpoint,
    chosen: str,
    cases: Sequence[Case],
    seed: int,
    report: Callable[[str, int, int], None],
) -> ParityResult:
    """Run the cases in the backend `chosen`, and deliberate mistakes in one drawn by `seed`; judge both.

    One model is in memory at a time: each file of the bundle, then the truth, then its members; what they give lies on
    the disk meanwhile, and so do weights that the checkpoint does not have as they are compared.
    """
    exported, row = bundle.manifest.export, BACKENDS[chosen]
    model = ConvertedWeights(source, exported).decoder(on_disk, getattr(torch, row.arithmetic(bundle)))
    yardstick = judging = yardstick_of(bundle, model, chosen)
    axes, mistakes = axes_of(bundle.manifest), _mistakes(exported, model)
    reference = prefill(source.config, max(source.config.training_length, SHORTEST_CONTROL), seed)
    reference = with_image(reference, axes) if axes else reference
    files = _files(bundle, chosen)
    tell = _counted(report, len(files) * len(cases) + (1 + MEMBERS) * (len(cases) + 1) + len(mistakes))
    rounded, itself, got = list[CaseResult](), list[Given](), dict[str, list[Given]]()
    cost, reach, caches, broken = None, None, Caches(), ""
    try:
        if exported.quantize or exported.extend:
            cost, reach = _effects(bundle, source, chosen, yardstick)
        if cost:
            _quantize(yardstick, bundle)
        caches = caches_of(bundle, chosen, yardstick, reference)
        if exported.calibrated:
            rounded, judging = _round(yardstick, bundle, chosen, reference)
        for which, load in files.items():
            got[which] = []
            got[which].extend(_given(load, cases, which, tell))
        itself = _itself(bundle, chosen, reference)
    except BackendError as error:
        broken = str(error)
    compared = cases[: min(map(len, got.values()), default=0)]
    *looks, own = judging.looks([*compared, reference], tell)
    by_file = {which: _judged(which, compared, looks, given) for which, given in got.items()}
    columns = [] if broken else [_columns(which, judged, looks) for which, judged in by_file.items()]
    rounded += [_judge(reference, own, given, f"{reference.name}, {MODEL} itself") for given in itself]
    judged = [each for of_case in zip(*by_file.values(), strict=True) for each in of_case]
    folding = [_folding(source, exported, seed)] if exported.fold_padding else []
    controls = _refusals(
        mistakes, reference, yardstick, own if judging is yardstick else yardstick.looks([reference])[0], tell
    )
    damaged = bundle.damaged() | contradictions(bundle, model)
    result = ParityResult(
        chosen, (*folding, *rounded, *caches.cases, *judged), (*controls, *caches.controls), damaged, broken, None,
        cost, caches.costs, reach, row.arithmetic(bundle), yardstick.allowance, tuple(columns),
        tested_by(chosen, bundle),
    )  # fmt: skip
    if result.passed:
        return result
    searched = [] if broken else _failing(cases, by_file) or [reference]
    return replace(result, place=_place(bundle, model, yardstick, searched, cost))


def _counted(report: Callable[[str, int, int], None], total: int) -> Callable[[str], None]:
    """`report`, for `total` comparisons that are told one after the other."""
    done = count()
    return lambda what: report(what, next(done), total)


def _given(
    load: Loading, cases: Sequence[Case], which: str = "", tell: Callable[[str], None] = lambda what: None
) -> Iterator[Given]:
    """What a file gives in each case; its backend is closed after the last."""
    with closing(load()) as tested:
        for case in cases:
            tell(case.name + which)
            yield given(case, tested)


def _effects(bundle: Bundle, source: Checkpoint, chosen: str, yardstick: Yardstick) -> tuple[Cost | None, Reach | None]:
    """What quantization costs, and what extending did: differences between the bundle and the checkpoint."""
    exported = bundle.manifest.export
    *_, variant = (each for each in BACKENDS[chosen].variants_of(bundle) if not each.cache)
    with closing(variant.load(bundle, USUALLY)) as used:
        cost = cost_of(bundle, yardstick.single.model, used) if exported.quantize else None
        if not exported.extend:
            return cost, None
        original = ConvertedWeights(source, ExportConfig(dtype=exported.dtype)).decoder(on_disk)
        return cost, reach_of(bundle, original, used)


def _mistakes(exported: ExportConfig, model: Decoder) -> tuple[Control, ...]:
    """Those that the export of a `model` could make."""
    spectrum = model.config.spectrum
    more = {FOLDED: exported.fold_padding, AXES: exported.position_axes, PHASES: spectrum.bases > 1}
    return (*CONTROLS, *(control for control, possible in more.items() if possible))


def tested_by(backend: str, bundle: Bundle) -> tuple[Tested, ...]:
    """The variants in which `backend` runs the bundle, each with the SHA-256 of its files: what a report is about."""
    hashes = bundle.manifest.files
    return tuple(
        Tested(backend, each.name, {name: hashes[name] for name in each.files(bundle)})
        for each in BACKENDS[backend].variants_of(bundle)
    )


def _failing(cases: Sequence[Case], by_file: Mapping[str, Sequence[CaseResult]]) -> list[Case]:
    """The first cases in which any file fails, LOCALIZED_CASES at most."""
    pairs = zip(cases, zip(*by_file.values(), strict=True), strict=False)
    return [case for case, judged in pairs if not all(each.verdict.passed for each in judged)][:LOCALIZED_CASES]


def yardstick_of(bundle: Bundle, model: Decoder, backend: str) -> SparingYardstick:
    """What `backend` is held against: `model`, which is the checkpoint's decoder converted as it was exported, in the
    arithmetic that the backend computes in and in float64.

    For a quantized bundle both have the checkpoint's weights at first; `_quantize` gives them those of the file.
    """
    single = model.sharing().to(getattr(torch, BACKENDS[backend].arithmetic(bundle)))
    return SparingYardstick(EagerBackend(single), EagerBackend.in_float64(model), allowance_of(bundle, model))


def _files(bundle: Bundle, chosen: str, settings: Settings = USUALLY) -> dict[str, Loading]:
    """What loads the backends that every case is run in, by what each adds to the case's name: nothing for the first
    variant, and its own name for another. Where a copy of a file can be made that does not round activations, it is
    that which is loaded.
    """
    first, *others = (each for each in BACKENDS[chosen].variants_of(bundle) if not each.rounds)
    exported = bundle.manifest.export

    def load(variant: Variant, name: str) -> Backend:
        with exact(bundle, name) as copied:
            return variant.load(copied, settings)

    copied = exported.calibrated and first.exact
    loading: dict[str, Loading] = {
        "": partial(load, first, plain_file(exported)) if copied else partial(first.load, bundle, settings)
    }
    return loading | {f", {each.name}": partial(load, each, each.files(bundle)[0]) for each in others}


def _itself(bundle: Bundle, chosen: str, case: Case) -> list[Given]:
    """What the portable file itself gives, where the other cases run a copy of it in another dtype; else nothing."""
    row = BACKENDS[chosen]
    if not row.widens or plain_file(bundle.manifest.export) == MODEL:
        return []

    def load() -> Backend:
        with portable(bundle) as copied:
            return row.variants[0].load(copied, USUALLY)

    return [*_given(load, [case])]


def _judge(case: Case, look: Look, got: Given, name: str) -> CaseResult:
    """Hold what a backend gave in one case against the case's `look`."""
    verdict, steps = look.judge(got.logits), len(case.steps)
    return CaseResult(name, case.length, case.positions, steps, len(got.logits), verdict, look.own, got.seconds)


def _judged(which: str, cases: Sequence[Case], looks: Sequence[Look], got: Sequence[Given]) -> list[CaseResult]:
    """The same of all cases that one file ran, whose names end with `which`."""
    return [_judge(case, look, each, case.name + which) for case, look, each in zip(cases, looks, got, strict=False)]


def _columns(which: str, judged: Sequence[CaseResult], looks: Sequence[Look]) -> ColumnResult:
    """Judge each logit over all cases of one file, whose names end with `which`."""

    def again() -> list[Noise]:
        return [look.again() for look in looks]

    return ColumnResult(f"all cases{which}", judge_columns([each.verdict for each in judged], again))


def _folding(source: Checkpoint, exported: ExportConfig, seed: int) -> CaseResult:
    """Hold the decoder with folded padding against the same one without, both in PyTorch in float32."""
    folded, model = (
        ConvertedWeights(source, msgspec.structs.replace(exported, dtype=FP32.name, fold_padding=fold)).decoder(on_disk)
        for fold in (True, False)
    )
    case = prefill(model.config, max(model.config.training_length, SHORTEST_CONTROL), seed)
    (look,) = SparingYardstick(EagerBackend(model), EagerBackend.in_float64(model)).looks([case])
    return _judge(case, look, given(case, EagerBackend(folded)), "folded against unfolded")


def _quantize(yardstick: Yardstick, bundle: Bundle) -> None:
    """Give the yardstick the rounded weights that the file holds.

    It gets a model of its own for that: the checkpoint's keeps its weights, because the file's other tensors are
    compared with them.
    """
    yardstick.single.model = yardstick.single.model.sharing()
    arithmetic = str(yardstick.single.model.dtype).removeprefix("torch.")
    for backend in (yardstick.single, yardstick.double):
        place_weights(bundle, backend.model, arithmetic, moved_to_disk)


def _round(
    yardstick: SparingYardstick, bundle: Bundle, chosen: str, case: Case
) -> tuple[list[CaseResult], SparingYardstick]:
    """For a bundle whose linear layers round their inputs: a comparison of it as it is, if a copy without that rounding
    can be made; then the yardstick for all other cases.

    Where the last digit decides, it is chance which of two steps an input is rounded to, and one such flip outweighs
    all other errors. So this comparison's float64 truth does not round, and its noise is that of members which do. That
    noise would hide small faults; in the other cases, therefore, neither side rounds inputs where a copy was made.
    """
    model = yardstick.single.model.sharing()
    round_inputs(bundle, model)
    rounding = SparingYardstick(EagerBackend(model), yardstick.double)
    first = BACKENDS[chosen].variants_of(bundle)[0]
    if not first.exact:
        return [], rounding
    [got], [look] = _given(partial(first.load, bundle, USUALLY), [case]), rounding.looks([case])
    return [replace(_judge(case, look, got, f"{case.name}, inputs rounded"), rounded=True)], yardstick


def _refusals(
    mistakes: Sequence[Control], case: Case, yardstick: Yardstick, look: Look,
    tell: Callable[[str], None] = lambda what: None,
) -> tuple[ControlResult, ...]:  # fmt: skip
    """Make each mistake in PyTorch in one case, and let the rule judge it by its `look`. A mistake that passes is a
    failure.
    """
    results = []
    for control in mistakes:
        tell(control.name)
        results.append(_refuse(control, case, yardstick, look))
    return tuple(results)


def _refuse(control: Control, case: Case, yardstick: Yardstick, look: Look) -> ControlResult:
    """The verdict on one deliberate mistake; or why it is left out: the model cannot make it, or it changes less than
    rounding does.
    """
    if reason := control.reason(yardstick.single.model):
        return ControlResult(control.name, reason, None)
    with control.applied(yardstick.single.model) as wrong:
        got = case.run(wrong)
    if (verdict := look.judge(got)).passed:
        with control.applied(yardstick.double.model) as wrong:
            effect = float(np.linalg.norm(case.run(wrong) - look.truth) / (np.linalg.norm(look.truth) or 1.0))
        if 0 < effect < UNSEEN * yardstick.eps:  # one that changes nothing at all is no mistake
            return ControlResult(control.name, f"without rounding it changes the logits by {effect:.0e} only", None)
    return ControlResult(control.name, "", verdict)


def contradictions(bundle: Bundle, model: Decoder) -> dict[str, str]:
    """Where the manifest describes another model than the converted `model`: the manifest's name, and the fields that
    differ; empty where all agree.
    """
    manifest = bundle.manifest
    spectra = [attention.rotary.spectrum.describe() for attention in model.attentions()]
    said = msgspec.to_builtins(manifest.decoder()) | {"spectra": manifest.spectra}
    known = msgspec.to_builtins(model.config) | {"spectra": spectra}
    wrong = [name for name, value in known.items() if said.get(name) != value]
    return {MANIFEST: f"contradicts the checkpoint in {', '.join(wrong)}"} if wrong else {}


def _place(bundle: Bundle, model: Decoder, yardstick: Yardstick, cases: Sequence[Case], cost: Cost | None) -> Place:
    """Where a failed bundle differs from its checkpoint: tensors, rotations, and the first node in one of the cases."""
    tensors, rotations = different_tensors(bundle, model), different_rotations(bundle, model)
    tensors += cost.strays if cost else ()
    divergences = (first_divergence(bundle, yardstick, _excerpt(case)) for case in cases)
    return Place(next((each for each in divergences if each), None), tuple(tensors), tuple(rotations))


def _excerpt(case: Case) -> Feeds:
    """The last tokens of a case, padding included, as whole sequences."""
    return Feeds(*(np.ascontiguousarray(array[:, -LOCALIZED:]) for array in case.feeds))
