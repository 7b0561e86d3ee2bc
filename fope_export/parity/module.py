"""Validation of a module's bundle: the decoder's rule and deliberate mistakes, on sizes that the graph never saw."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fope_export.backends.choose import choose, read_machine
from fope_export.backends.eager import in_numpy
from fope_export.backends.ort import OrtGraph
from fope_export.bundle import MANIFEST, Bundle, ModuleRecord, Port
from fope_export.errors import BackendError, BundleError, ParityError
from fope_export.fope.replace import rotaries
from fope_export.graph.module import Inputs, arguments, class_name, constant, state_hash
from fope_export.parity.controls import CONTROLS, Control
from fope_export.parity.judge import Verdict, judge
from fope_export.parity.localise import different_rotations, different_tensors, divergence_of
from fope_export.parity.run import CaseResult, ControlResult, ParityResult, Place

Arrays = list[NDArray[Any]]
DTYPES = {"float": torch.float32, "double": torch.float64}
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
    """A module as it is, and a copy that computes everything but the angles in float64."""

    single: nn.Module
    double: nn.Module
    outputs: tuple[str, ...]

    def run(self, case: ModuleCase) -> tuple[Arrays, Arrays]:
        """The truth, and what the module makes of it.

        Raises ParityError where PyTorch does not run.
        """
        hint = "Give inputs that the module takes."
        try:
            noisy = run_module(self.single, case.inputs)
            hint = FOLLOW
            return run_module(self.double, case.inputs, torch.float64), noisy
        except Exception as cause:  # the module's own code runs in there
            raise ParityError(f"{case.name}: PyTorch does not run the module: {cause}", hint=hint) from cause

    def judge(self, reference: tuple[Arrays, Arrays], got: Arrays) -> list[Verdict]:
        """Hold each output against the truth."""
        return [_verdict(*each) for each in zip(self.outputs, *reference, got, strict=True)]


def validate_module(
    bundle: str | Path | Bundle,
    module: nn.Module,
    inputs: Sequence[Inputs] | None = None,
    *,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ParityResult:
    """Compare a bundle in ONNX Runtime with the module that it was exported from, on each of `inputs`.

    Without them, on random ones between the smallest and largest value of each input's example, with every size that
    may change at its smallest, odd, and nearly four times as large; name ranges that make sense by exporting with
    examples that do.

    Raises BundleError when it is another module, BackendError without ONNX Runtime, and ParityError where PyTorch
    itself does not run.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=False)
    record, single = _check_source(bundle, module), constant(module)
    cases = _given(bundle, module, inputs) if inputs else list(standard_cases(bundle, seed))
    names = tuple(port.name for port in bundle.manifest.outputs)
    yardstick = ModuleYardstick(single, copy.deepcopy(single).double(), names)
    total, broken = len(cases) + len(CONTROLS), ""
    results: list[CaseResult] = []
    failing: list[ModuleCase] = []
    choose("onnxruntime", read_machine(), bundle.manifest.export)
    try:
        graph = OrtGraph(bundle)
        for done, case in enumerate(cases):
            report(case.name, done, total)
            found = _compare(case, yardstick, graph.run(_feeds(bundle, case)))
            results += found
            failing += [] if all(result.verdict.passed for result in found) else [case]
    except BackendError as error:
        broken = str(error)
    largest = max(cases, key=lambda case: case.length)
    report("controls", len(cases), total)
    controls = _controls(largest, yardstick)
    damaged = bundle.damaged() | _contradictions(bundle, record, single)
    result = ParityResult(
        "onnxruntime", tuple(results), controls, damaged, broken, None, dtype=bundle.manifest.export.precision
    )
    if result.passed:
        return result
    return replace(result, place=_place(bundle, yardstick, None if broken else (failing or [largest])[0]))


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
    return max(size if extent.most is None else min(size, extent.most), extent.least)


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
    found = []
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
        found.append(ModuleCase(f"input {i}", max(free, default=1), tensors))
    return found


def _feeds(bundle: Bundle, case: ModuleCase) -> dict[str, NDArray[Any]]:
    """The case under the graph's names; bfloat16 runs as its float32 copy."""
    tensors = [case.inputs[name].detach().cpu() for name in bundle.manifest.module().arguments]
    narrow = torch.bfloat16
    arrays = [(tensor.float() if tensor.dtype == narrow else tensor).numpy() for tensor in tensors]
    return {port.name: array for port, array in zip(bundle.manifest.inputs, arrays, strict=True)}


def _compare(case: ModuleCase, yardstick: ModuleYardstick, got: Arrays) -> list[CaseResult]:
    """A comparison for each output."""
    several = len(yardstick.outputs) > 1
    names = [f"{case.name}: {output}" if several else case.name for output in yardstick.outputs]
    verdicts = yardstick.judge(yardstick.run(case), got)
    return [
        CaseResult(name, case.length, None, 1, len(_rows(array)), verdict)
        for name, array, verdict in zip(names, got, verdicts, strict=True)
    ]


def _verdict(name: str, truth: NDArray[Any], noisy: NDArray[Any], got: NDArray[Any]) -> Verdict:
    if not truth.any():
        raise ParityError(f"output {name} is zero everywhere", hint="Give the module trained or random weights.")
    return judge(_rows(truth), _rows(noisy), _rows(got))


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    """As logits are judged: along the last axis."""
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)


def _controls(case: ModuleCase, yardstick: ModuleYardstick) -> tuple[ControlResult, ...]:
    reference = yardstick.run(case)
    return tuple(_refuse(control, case, yardstick, reference) for control in CONTROLS)


def _refuse(
    control: Control, case: ModuleCase, yardstick: ModuleYardstick, reference: tuple[Arrays, Arrays]
) -> ControlResult:
    """Hold a deliberate mistake against the truth; it is refused when one output refuses it."""
    if reason := control.reason(yardstick.single):
        return ControlResult(control.name, reason, None)
    with control.made(yardstick.single):
        wrong = run_module(yardstick.single, case.inputs)
    verdicts = yardstick.judge(reference, wrong)
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
    found = rotaries(module)
    spectra = [rotary.spectrum.describe() for rotary in found.values()]
    rotations = {name: rotary.config for name, rotary in found.items()}
    same = spectra == bundle.manifest.spectra and rotations == record.rotations
    return {} if same else {MANIFEST: "contradicts the module in its rotations"}


def _place(bundle: Bundle, yardstick: ModuleYardstick, case: ModuleCase | None) -> Place:
    """Where the bundle first differs, on `case` if it runs."""
    try:
        tensors = tuple(different_tensors(bundle, yardstick.single))
        rotations = tuple(different_rotations(bundle, yardstick.single))
        if case is None:
            return Place(None, tensors, rotations)
        single = yardstick.single, partial(run_module, yardstick.single, case.inputs)
        double = yardstick.double, partial(run_module, yardstick.double, case.inputs, torch.float64)
        return Place(divergence_of(bundle, single, double, _feeds(bundle, case)), tensors, rotations)
    except DecodeError:  # no ONNX file any more
        return Place(None, (), ())
