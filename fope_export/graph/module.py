"""Any module with a FopeRotary inside, as a bundle: what a decoder's checkpoint says, its example inputs say here."""

import copy
import hashlib
import inspect
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
import torch
from onnx_ir.passes import InvariantError, PassError
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree

from fope_export.bundle import Bundle, check_target, creating, finish_manifest
from fope_export.config import ExportConfig
from fope_export.dtypes import FP32
from fope_export.errors import ConfigError, ExportError
from fope_export.fope import contract
from fope_export.fope.replace import rotaries
from fope_export.fope.rotary import FopeRotary, normalized
from fope_export.graph.export import add_plain_file, check, lower, manifest_of, quiet, save
from fope_export.graph.inlining import inlined
from fope_export.graph.masks import ExpandMasks
from fope_export.graph.sizes import Axes, axes_of, dimensions, extents, symbols_of
from fope_export.lock import TIMEOUT
from fope_export.manifest import MODEL, ModuleRecord, Source, weights_file
from fope_export.model.decoder import DTYPES

Inputs = Sequence[Tensor] | Mapping[str, Tensor]
"""What a module is called with: tensors in order, or by the names of its forward's parameters."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
REASON = 600
"""Characters of another program's message that are passed on."""
TRACED = "Does torch.export.export(module, example_inputs, dynamic_shapes=…) run? Its message is this error's cause."


def export_module(
    module: nn.Module,
    example_inputs: Inputs,
    out: str | Path,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    config: ExportConfig | None = None,
    lock_timeout: float = TIMEOUT,
) -> Bundle:
    """Write the bundle of a `module`, which is in eval mode and has a FopeRotary inside, to folder `out`, whole or not
    at all. It is exported in the dtype that it has, and left as it is.

    `example_inputs` and `dynamic_shapes` are what torch.export takes; the names of its `Dim`s become the graph's.
    Without `input_names`, inputs are called as the forward's parameters are; without `output_names`, outputs as the
    keys of a dictionary. The smallest and largest value of each example is recorded: `validate_module` draws its inputs
    between them. Of `config` only `opset` and `inline` count. Another writer of `out` is waited for, for `lock_timeout`
    seconds.

    Raises ExportError where the module cannot be traced or written, ConfigError for names or settings that it cannot
    have, and BundleError where `out` holds something else; then `out` is as it was.

    >>> import fope_export as fx, torch
    >>> rotary = fx.FopeRotary.create(head_dim=16, groups=1, training_length=64).eval()
    >>> example = torch.rand(1, 8, 2, 16), torch.rand(1, 8, 1, 16), torch.arange(8)[None]
    >>> fx.export_module(rotary, example, "rotary").manifest.model.arguments
    ['q', 'k', 'position_ids']
    """
    out = Path(out)
    check_target(out)
    config = _resolved(config or ExportConfig(), module)
    rotations = _checked(module)
    example = arguments(module, example_inputs)
    axes = axes_of(list(example), dynamic_shapes)
    with quiet():
        program = _trace(constant(module), example, axes if dynamic_shapes else None)
        inputs = _renamed(list(example), input_names, "input")
        outputs = _renamed(_output_names(program), output_names, "output")
        _check_names([*inputs, *outputs], module)
        symbols = symbols_of(program, inputs, axes)
        model = _lower(program, config, inputs, outputs, symbols)
    calls = sum(node.domain == contract.DOMAIN for node in model.graph)
    model = inlined(model) if config.inline else model
    record = ModuleRecord(
        arguments=list(example),
        sizes=extents(program, example.values(), symbols),
        values={name: _range(tensor) for name, tensor in zip(inputs, example.values(), strict=True)},
        rotations={name: rotary.config for name, rotary in rotations.items()},
        calls=calls,
    )
    source = Source(path=class_name(module), layout="module", files={"state_dict": state_hash(module)})
    with creating(out, lock_timeout=lock_timeout) as folder:
        digests = save(model, folder / MODEL, weights_file(config))
        check(folder / MODEL)
        add_plain_file(folder / MODEL, config)
        spectra = [rotary.spectrum.describe() for rotary in rotations.values()]
        manifest = finish_manifest(folder, manifest_of(model, config, source, record, spectra), digests)
    return Bundle(out, manifest)


def class_name(module: nn.Module) -> str:
    """Where the module's class is."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the `state_dict`."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def arguments(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Tensors by the parameters of the module's forward that they are for, in its order.

    Raises ExportError where they are not its inputs, or not tensors.
    """
    if not isinstance(inputs, Sequence | Mapping):
        raise ExportError(
            f"the inputs are a {type(inputs).__name__}, expected a tuple or a dictionary of tensors",
            hint="Write (x,) for a single one.",
        )
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as cause:
        raise ExportError(
            f"{type(module).__name__}.forward does not take these inputs: {cause}",
            hint="Give the tensors in its order, or as a dictionary by its parameters' names.",
        ) from cause
    for name, value in bound.arguments.items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"input {name} is {type(value).__name__}, expected a tensor",
                hint="Wrap the module in one whose forward takes tensors by name, and gives it the rest.",
            )
    return bound.arguments


def _checked(module: nn.Module) -> dict[str, FopeRotary]:
    """Its rotations."""
    if module.training:
        raise ExportError(f"{type(module).__name__} is in training mode", hint="Call module.eval() before.")
    if not (rotations := rotaries(module)):
        raise ExportError(
            f"{type(module).__name__} has no FopeRotary inside",
            hint="Construct one in its attention, or put it in your own code's place with replace_rotary(module, …).",
        )
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.dtype.itemsize < FP32.itemsize and not weight.isfinite().all():
            raise ExportError(
                f"{name} holds NaN or infinity in {weight.dtype}",
                hint="Was it cast? float16 ends at 65,504: bfloat16 has float32's range.",
            )
    return rotations


def _resolved(config: ExportConfig, module: nn.Module) -> ExportConfig:
    """With the module's dtype, of several the last in the table."""
    plain = ExportConfig(opset=config.opset, inline=config.inline)
    if others := [name for name in config.__struct_fields__ if getattr(config, name) != getattr(plain, name)]:
        raise ConfigError(
            f"a module is exported as it is, without {', '.join(others)}",
            hint="Its own dtype decides (module.half(), module.bfloat16()); caches are inputs and outputs of its own.",
        )
    inside = {id(p) for rotary in rotaries(module).values() for p in rotary.parameters()}
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point() and id(p) not in inside}
    if unknown := dtypes - NAMES.keys():
        raise ExportError(f"{type(module).__name__} has weights in {unknown.pop()}", hint="Call module.float() before.")
    present = [name for dtype, name in NAMES.items() if dtype in dtypes]
    return msgspec.structs.replace(config.resolved(1), dtype=present[-1] if present else FP32.name)


def constant(module: nn.Module) -> nn.Module:
    """The module with coefficients that are numbers where they were normalized in every call; weights are shared."""
    if not any(rotary.normalize for rotary in rotaries(module).values()):
        return module
    shared = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for rotary in rotaries(shared).values():
        if rotary.normalize:
            rotary.normalize = False
            rotary.sin_coef, rotary.cos_coef = (
                nn.Parameter(normalized(coef.detach())) for coef in (rotary.sin_coef, rotary.cos_coef)
            )
    return shared


def _trace(module: nn.Module, inputs: dict[str, Tensor], axes: Axes | None) -> ExportedProgram:
    try:
        with torch.no_grad():
            program = torch.export.export(module, (), inputs, dynamic_shapes=axes, strict=False)
    except Exception as cause:  # the module's own code runs in there
        message = str(cause)
        fixes = message.partition("Suggested fixes:")[2]
        raise ExportError(
            f"torch.export does not trace {type(module).__name__}: {_short(message)}",
            hint=f"torch suggests for dynamic_shapes: {_short(fixes)}" if fixes else TRACED,
        ) from cause
    return program


def _short(message: str) -> str:
    return textwrap.shorten(message, REASON, placeholder=" …")


def _output_names(program: ExportedProgram) -> list[str]:
    """One for each tensor that the module gives back."""
    outputs = [spec.arg for spec in program.graph_signature.output_specs]
    numbers = list(range(len(outputs)))
    structure = pytree.tree_unflatten(numbers, program.call_spec.out_spec)
    names = ["output"] if structure == 0 else [f"output.{i}" for i in numbers]
    if isinstance(structure, Mapping) and list(structure.values()) == numbers:
        names = [str(key) for key in structure]
    seen = set(program.graph_signature.user_inputs)
    for name, output in zip(names, outputs, strict=True):
        if not isinstance(output, TensorArgument) or output.name in seen:
            told = "an input, or the same as another output" if isinstance(output, TensorArgument) else "no tensor"
            raise ExportError(
                f"{name} is {told}; expected a tensor of its own",
                hint="Wrap the module in one whose forward gives back each tensor once, and nothing else.",
            )
        seen.add(output.name)
    return names


def _renamed(names: list[str], wanted: Sequence[str] | None, what: str) -> list[str]:
    if wanted is None or len(wanted) == len(names):
        return list(wanted or names)
    raise ExportError(
        f"{len(wanted)} {what}_names for {len(names)} {what}s: {', '.join(names)}", hint=f"Name every {what}, in order."
    )


def _check_names(names: list[str], module: nn.Module) -> None:
    taken = Counter([*names, *module.state_dict()])
    if clash := next((name for name in names if taken[name] > 1 or not name), None):
        raise ExportError(
            f"the name {clash!r} stands for two things in the graph",
            hint="Give input_names and output_names that are unlike each other and the module's weights.",
        )


def _lower(
    program: ExportedProgram, config: ExportConfig, inputs: list[str], outputs: list[str], symbols: Mapping[str, str]
) -> ir.Model:
    try:
        model = ExpandMasks()(lower(program, config, inputs, outputs, partial(dimensions, symbols=symbols))).model
    except (torch.onnx.OnnxExporterError, InvariantError, PassError) as cause:
        raise ExportError(
            f"torch.onnx does not translate the module: {_short(_deepest(cause))}",
            hint="Every operator in it needs a counterpart in ONNX, and every rotation fixed heads and channels.",
        ) from cause
    model.graph.name = "fope_module"
    return model


def _deepest(error: BaseException) -> str:
    """The message at the bottom of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _range(tensor: Tensor) -> tuple[float, float]:
    finite = tensor.detach().double()
    finite = finite[finite.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
