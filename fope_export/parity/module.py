"""Validation of a module's bundle: the decoder's rule and deliberate mistakes, on sizes that the graph never saw."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fope_export import dtypes
from fope_export.backends.choose import BACKENDS, choose
from fope_export.backends.eager import in_numpy
from fope_export.backends.machine import read_machine
from fope_export.backends.ort import OrtGraph
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, BundleError, ParityError
from fope_export.fope.replace import rotaries
from fope_export.fope.sameness import Call, seen_calls
from fope_export.graph.module import Inputs, arguments, class_name, constant, state_hash
from fope_export.manifest import MANIFEST, MODEL, ModuleRecord, Port, plain_file
from fope_export.onnx_files import check_graphs
from fope_export.parity.controls import AXES, CONTROLS, PHASES, ROUNDED, Control
from fope_export.parity.copies import portable
from fope_export.parity.judge import MEMBERS, Floats, Noise, Verdict, judge_columns
from fope_export.parity.localize import different_rotations, different_tensors, divergence_of
from fope_export.parity.results import CaseResult, ColumnResult, ControlResult, ParityResult, Place
from fope_export.parity.run import tested_by
from fope_export.parity.yardstick import Look, look, moved, neighbours

Arrays = list[NDArray[Any]]
DTYPES = {"float": torch.float32, "double": torch.float64}
WIDENED: dict[torch.dtype, torch.dtype] = {
    getattr(torch, row.precision): getattr(torch, row.widened.precision)
    for row in dtypes.DTYPES.values()
    if row.widened
}
"""The manifest's names that are not torch's."""
FOLLOW = "In float64 too, tensors must follow the dtype of weights or inputs: write x.to(weight.dtype), not x.float()."


@dataclass(frozen=True)
class ModuleCase:
    """Inputs by the parameters of the module's forward; `length` is the largest of the sizes that may change."""

    name: str
    length: int
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class ModuleYardstick:
    """A module in the arithmetic that ONNX Runtime computes it in, and a copy that computes everything but the angles
    in float64.
    """

    single: nn.Module
    double: nn.Module
    outputs: tuple[str, ...]
    dtype: torch.dtype
    """Of the arithmetic."""
    widened: bool
    """Whether that is another one than the module's own, so that inputs have to follow."""

    @property
    def eps(self) -> float:
        """Of the arithmetic."""
        return float(torch.finfo(self.dtype).eps)

    def member(self, case: ModuleCase, number: int) -> tuple[nn.Module, Callable[[], Arrays]]:
        """A module that shows what rounding does, and its run: inputs are moved as weights are."""
        model, generator = moved(self.single, number), torch.Generator().manual_seed(number)
        inputs = {name: neighbours(tensor, generator) for name, tensor in self.inputs(case).items()}
        return model, partial(run_module, model, inputs)

    def inputs(self, case: ModuleCase) -> dict[str, Tensor]:
        """As the arithmetic takes them."""
        wide = {name: tensor.to(self.dtype) for name, tensor in case.inputs.items() if tensor.is_floating_point()}
        return case.inputs | wide if self.widened else case.inputs

    def truth(self, case: ModuleCase) -> tuple[nn.Module, Callable[[], Arrays]]:
        """The module in float64, and its run."""
        return self.double, partial(run_module, self.double, case.inputs, torch.float64)

    def looks(self, case: ModuleCase) -> list[Look]:
        """At each output.

        Raises ParityError where PyTorch does not run, or where an output is zero everywhere.
        """
        members = cache(lambda number: self._run(case, self.member(case, number), "Give inputs that the module takes."))
        members(0)
        truth = self._run(case, self.truth(case), FOLLOW)
        for name, output in zip(self.outputs, truth, strict=True):
            if not output.any():
                raise ParityError(
                    f"output {name} is zero everywhere", hint="Give the module trained or random weights."
                )

        def given(output: int, numbers: range) -> Iterator[Floats]:
            return (rows(members(number)[output]) for number in numbers)

        return [look(rows(array), partial(given, output), self.eps) for output, array in enumerate(truth)]

    def _run(self, case: ModuleCase, running: tuple[nn.Module, Callable[[], Arrays]], hint: str) -> Arrays:
        try:
            return running[1]()
        except Exception as cause:  # the module's own code runs in there
            raise ParityError(f"{case.name}: PyTorch does not run the module: {cause}", hint=hint) from cause


def validate_module(
    bundle: str | Path | Bundle,
    module: nn.Module,
    inputs: Sequence[Inputs] | None = None,
    *,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ParityResult:
    """Run a bundle in ONNX Runtime, and compare its outputs with those of the `module` that it was exported from, on
    each of `inputs`; `passed` and `failures` of the result are as for `validate`.

    Without `inputs`, random ones drawn by `seed` are taken: between the smallest and the largest value of each input's
    example at export, and with every size that may change at its smallest, odd, and nearly four times the example's.
    `report` is as for `validate`.

    Raises BundleError when it is another module, BackendError without ONNX Runtime, and ParityError where PyTorch
    itself does not run.

    >>> import fope_export as fx, torch
    >>> class Rotated(torch.nn.Module):
    ...     def forward(self, q, k, position_ids):
    ...         return self.rotary(q, k, position_ids)
    >>> module = Rotated().eval()
    >>> module.rotary = fx.FopeRotary.create(head_dim=16, groups=1, training_length=64).eval()
    >>> example = torch.rand(1, 8, 2, 16), torch.rand(1, 8, 1, 16), torch.arange(8)[None]
    >>> fx.validate_module(fx.export_module(module, example, "rotated"), module).passed
    True
    """
    bundle = Bundle.of(bundle)
    check_graphs(bundle)
    record, single = _check_source(bundle, module), constant(module)
    cases = _given(bundle, module, inputs) if inputs else list(standard_cases(bundle, seed))
    yardstick = yardstick_of(bundle, single)
    largest = max(cases, key=lambda case: case.length)
    mistakes, broken = _mistakes(single, yardstick.inputs(largest)), ""
    total = len(cases) + len(mistakes)
    judged: list[tuple[ModuleCase, list[CaseResult]]] = []
    columns, itself = tuple[ColumnResult, ...](), list[CaseResult]()
    choose("onnxruntime", read_machine(), bundle.manifest.export)
    try:
        graph = OrtGraph(bundle)
        for done, case in enumerate(cases):
            report(case.name, done, total)
            judged.append((case, _compare(case, yardstick, graph, bundle)))
        columns = tuple(_columns(judged, yardstick))
        itself = _itself(bundle, yardstick, cases[0])
    except BackendError as error:
        broken = str(error)
    report("controls", len(cases), total)
    controls = _controls(mistakes, largest, yardstick)
    damaged = bundle.damaged() | _contradictions(bundle, record, single)
    results = (*itself, *(each for _, outputs in judged for each in outputs))
    result = ParityResult(
        "onnxruntime", results, controls, damaged, broken, None, columns=columns,
        dtype=str(yardstick.dtype).removeprefix("torch."), tested=tested_by("onnxruntime", bundle)[:1],
    )  # fmt: skip
    if result.passed:
        return result
    failing = [case for case, outputs in judged if not all(each.verdict.passed for each in outputs)]
    return replace(result, place=_place(bundle, yardstick, None if broken else (failing or [largest])[0]))


def yardstick_of(bundle: Bundle, module: nn.Module) -> ModuleYardstick:
    """For a module without gradients."""
    arithmetic = BACKENDS["onnxruntime"].arithmetic(bundle)
    dtype, widened = getattr(torch, arithmetic), arithmetic != bundle.manifest.export.precision
    single = copy.deepcopy(module).to(dtype) if widened else module
    names = tuple(port.name for port in bundle.manifest.outputs)
    return ModuleYardstick(single, copy.deepcopy(module).double(), names, dtype, widened)


def run_module(module: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Arrays:
    """Its output tensors, flat; `dtype` is that of floating point inputs, where they are to have another."""
    device = next(module.parameters()).device
    moved = {
        name: tensor.to(device, dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
    with torch.inference_mode():
        return [in_numpy(tensor) for tensor in pytree.tree_leaves(module(**moved))]


def standard_cases(bundle: Bundle, seed: int = 0) -> Iterator[ModuleCase]:
    """Random inputs at the example's sizes, at all twice as large and odd, and at each one's smallest and largest."""
    record, generator = bundle.manifest.module(), torch.Generator().manual_seed(seed)
    example = {name: extent.example for name, extent in record.sizes.items()}
    double = {name: _within(record, name, 2 * size + 1) for name, size in example.items()}
    wanted = [example, double]
    for name, size in example.items():
        wanted += [example | {name: _within(record, name, other)} for other in (1, 4 * size - 1)]
    seen = []
    for sizes in wanted:
        if sizes not in seen:
            seen.append(sizes)
            pairs = zip(record.arguments, bundle.manifest.inputs, strict=True)
            drawn = {name: _drawn(port, sizes, record.values[port.name], generator) for name, port in pairs}
            name = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "example's sizes"
            yield ModuleCase(name, max(sizes.values(), default=1), drawn)


def _within(record: ModuleRecord, name: str, size: int) -> int:
    extent = record.sizes[name]
    return max(size if extent.max is None else min(size, extent.max), extent.min)


def _drawn(port: Port, sizes: Mapping[str, int], values: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Uniform between the example's smallest and largest value, both included; around a float that is alone, normal."""
    dtype, shape, (least, most) = DTYPES.get(port.dtype) or getattr(torch, port.dtype), port.at(sizes), values
    if dtype.is_floating_point and least == most:
        return (least + torch.randn(shape, generator=generator)).to(dtype)
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    if dtype.is_floating_point:
        return (least + share * (most - least)).to(dtype)
    return (least + (share * (most - least + 1)).floor()).to(dtype)


def _given(bundle: Bundle, module: nn.Module, inputs: Sequence[Inputs]) -> list[ModuleCase]:
    cases = []
    for i, each in enumerate(inputs):
        tensors = arguments(module, each)
        pairs = list(zip(bundle.manifest.inputs, tensors.values(), strict=False))
        for port, tensor in pairs:
            wanted = DTYPES.get(port.dtype) or getattr(torch, port.dtype)
            if tensor.dtype != wanted or tensor.ndim != len(port.shape) or len(pairs) < len(bundle.manifest.inputs):
                raise ParityError(
                    f"input {i}: {port.name} is {tensor.dtype} {tuple(tensor.shape)}",
                    hint=f"Give {wanted} {port.shape}.",
                )
        free = [n for port, t in pairs for n, size in zip(t.shape, port.shape, strict=True) if isinstance(size, str)]
        cases.append(ModuleCase(f"input {i}", max(free, default=1), tensors))
    return cases


def _feeds(bundle: Bundle, case: ModuleCase) -> dict[str, NDArray[Any]]:
    """The case under the graph's names, in the dtypes that the copy of the graph has (`Dtype.widened`)."""
    tensors = [case.inputs[name].detach().cpu() for name in bundle.manifest.module().arguments]
    arrays = [tensor.to(WIDENED.get(tensor.dtype, tensor.dtype)).numpy() for tensor in tensors]
    return {port.name: array for port, array in zip(bundle.manifest.inputs, arrays, strict=True)}


def _compare(case: ModuleCase, yardstick: ModuleYardstick, graph: OrtGraph, bundle: Bundle) -> list[CaseResult]:
    """Run the graph: a comparison for each output."""
    feeds, started = _feeds(bundle, case), time.perf_counter()
    got = graph.run(feeds)
    seconds = time.perf_counter() - started
    several = len(yardstick.outputs) > 1
    names = [f"{case.name}: {output}" if several else case.name for output in yardstick.outputs]
    return [
        CaseResult(name, case.length, None, 1, len(rows(array)), look.judge(rows(array)), look.own, seconds)
        for name, array, look in zip(names, got, yardstick.looks(case), strict=True)
    ]


def _itself(bundle: Bundle, yardstick: ModuleYardstick, case: ModuleCase) -> list[CaseResult]:
    """A comparison of the portable file where ONNX Runtime runs a copy of it that was made at export."""
    if plain_file(bundle.manifest.export) == MODEL:
        return []
    with portable(bundle) as copied:
        graph = OrtGraph(copied)
    return _compare(replace(case, name=f"{case.name}, {MODEL} itself"), yardstick, graph, bundle)


def _columns(
    judged: Sequence[tuple[ModuleCase, list[CaseResult]]], yardstick: ModuleYardstick
) -> Iterator[ColumnResult]:
    """Pool the cases of each output, as far as its rows are of one length."""
    for output, name in enumerate(yardstick.outputs):
        verdicts = [(case, results[output].verdict) for case, results in judged]
        for width in dict.fromkeys(len(verdict.columns.got) for _, verdict in verdicts):
            alike = [(case, verdict) for case, verdict in verdicts if len(verdict.columns.got) == width]

            def again(alike: list[tuple[ModuleCase, Verdict]] = alike, output: int = output) -> list[Noise]:
                return [yardstick.looks(case)[output].again() for case, _ in alike]

            verdict = judge_columns([verdict for _, verdict in alike], again)
            yield ColumnResult(f"all cases: {name}, {width} wide", verdict)


def rows(array: NDArray[Any]) -> NDArray[Any]:
    """As logits are judged: along the last axis."""
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)


def _mistakes(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Control, ...]:
    """Those that an export of the module could make, and that show where it is called with these inputs."""
    calls = seen_calls(module, list(rotaries(module).values()), inputs)
    positions = [value for each in calls.values() for call in each for value in _positions(call)]
    phases = any(rotary.config.bases > 1 for rotary in rotaries(module).values())
    more = {
        AXES: any(x.ndim == 3 and not torch.equal(x, x[:1].expand_as(x)) for x in positions),
        PHASES: phases,
        ROUNDED: any(not torch.equal(x, x.round()) for x in positions),
    }
    return (*CONTROLS, *(control for control, possible in more.items() if possible))


def _positions(call: Call) -> list[Tensor]:
    """The third of a rotation's arguments."""
    return [*call.args[2:3], *([call.kwargs["position_ids"]] if "position_ids" in call.kwargs else [])]


def _controls(mistakes: Sequence[Control], case: ModuleCase, yardstick: ModuleYardstick) -> tuple[ControlResult, ...]:
    looks = yardstick.looks(case)
    return tuple(_refuse(control, case, yardstick, looks) for control in mistakes)


def _refuse(control: Control, case: ModuleCase, yardstick: ModuleYardstick, looks: Sequence[Look]) -> ControlResult:
    """Hold a deliberate mistake against the truth; it is refused when one output refuses it."""
    if reason := control.reason(yardstick.single):
        return ControlResult(control.name, reason, None)
    with control.made(yardstick.single):
        wrong = run_module(yardstick.single, yardstick.inputs(case))
    verdicts = [look.judge(rows(array)) for look, array in zip(looks, wrong, strict=True)]
    return ControlResult(control.name, "", next((v for v in verdicts if not v.passed), verdicts[0]))


def _check_source(bundle: Bundle, module: nn.Module) -> ModuleRecord:
    record, source = bundle.manifest.module(), bundle.manifest.source
    if module.training:
        raise ParityError(f"{class_name(module)} is in training mode", hint="Call module.eval() before.")
    if state_hash(module) != source.files["state_dict"]:
        raise BundleError(
            f"{class_name(module)} is not the module that {bundle.path} was exported from ({source.path}): "
            "its state_dict differs",
            hint="Load the weights that were exported, or export again.",
        )
    return record


def _contradictions(bundle: Bundle, record: ModuleRecord, module: nn.Module) -> dict[str, str]:
    """What the manifest says about the rotations and the module does not, as a reason against the manifest."""
    by_name = rotaries(module)
    spectra = [rotary.spectrum.describe() for rotary in by_name.values()]
    rotations = {name: rotary.config for name, rotary in by_name.items()}
    same = spectra == bundle.manifest.spectra and rotations == record.rotations
    return {} if same else {MANIFEST: "contradicts the module in its rotations"}


def _place(bundle: Bundle, yardstick: ModuleYardstick, case: ModuleCase | None) -> Place:
    """Where the bundle first differs, on `case` if it runs."""
    tensors = tuple(different_tensors(bundle, yardstick.single))
    rotations = tuple(different_rotations(bundle, yardstick.single))
    if case is None:
        return Place(None, tensors, rotations)
    members = [yardstick.member(case, number) for number in range(MEMBERS)]
    divergence = divergence_of(bundle, yardstick.truth(case), members, _feeds(bundle, case), yardstick.eps)
    return Place(divergence, tensors, rotations)
