"""Checkpoint to bundle: torch.export, torch.onnx, passes, checker, manifest."""

import gc
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, ShapeInferencePass
from torch.export import Dim, ExportedProgram

from fope_export.bundle import Bundle, check_target, creating, finish_manifest
from fope_export.config import ExportConfig, ModelConfig
from fope_export.dtypes import FP16
from fope_export.errors import ExportError
from fope_export.graph import passes
from fope_export.graph.companions import companions
from fope_export.graph.inlining import inlined
from fope_export.graph.measuring import measured_on, sampled
from fope_export.graph.repetition import first_layers, repeat, repeats
from fope_export.graph.streaming import Numbers, give_numbers, one_ahead, without_numbers
from fope_export.graph.transformers_js import for_transformers_js
from fope_export.graph.translation import TRANSLATIONS
from fope_export.graph.ways import Measured, way_of
from fope_export.hashing import HashedFile, Hashing
from fope_export.lock import TIMEOUT
from fope_export.manifest import FORMAT_VERSION, MODEL, Manifest, ModuleRecord, Port, Source, plain_file, weights_file
from fope_export.model.checkpoint import Checkpoint, open_checkpoint
from fope_export.model.conversion import ConvertedWeights
from fope_export.model.decoder import Decoder

INLINE_BYTES = 1024
"""Smaller tensors stay in model.onnx; the others go to model.onnx.data."""
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")
INVALID = "Install torch, onnx and onnxscript in the versions that the manifest of a bundle which is valid names."
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"


def export(
    checkpoint: str | Path,
    out: str | Path,
    config: ExportConfig | None = None,
    *,
    adapter: str | Path | None = None,
    calibration: Path | None = None,
    lock_timeout: float = TIMEOUT,
    report: Callable[[str], None] = lambda stage: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bundle:
    """Write the bundle of the checkpoint in folder `checkpoint` to folder `out`, whole or not at all.

    A bundle that stands there is replaced; the same checkpoint and `config` give the same bytes. `adapter` is a folder
    with a LoRA adapter that PEFT saved, which is merged into the checkpoint first. `calibration` is a
    file of text or token ids, on which is measured what `config` needs to round linear layers; without it, the source
    of Python's standard library is. Where `config` does not say how weights in blocks are rounded, they are compensated
    if a file is given, or if that is usual and the checkpoint has a tokenizer. Another writer of `out` is waited for,
    for `lock_timeout` seconds. `report` is told each stage as it begins, and `progress` how many bytes of weights are
    written, and how many there are.

    Raises CheckpointError where the checkpoint cannot be read, ConfigError where it and `config` do not go together,
    BundleError where `out` holds something else, ExportError where the model cannot be written, and BackendError where
    a quantizer is not installed; then `out` is as it was.

    >>> import fope_export as fx
    >>> fx.export("checkpoint", "exported", fx.ExportConfig(cache="static")).manifest.export.capacity
    1024
    """
    out = Path(out)
    check_target(out)
    report("reading the checkpoint")
    source = open_checkpoint(checkpoint, adapter=adapter)
    config, windows = sampled(source, (config or ExportConfig()).resolved(source.config.training_length), calibration)
    outline, weights = source.outline.converted(config), ConvertedWeights(source, config)
    require_space(out, sum(parameter.nbytes for parameter in outline.parameters()))
    with creating(out, lock_timeout=lock_timeout) as folder, Hashing(source.files) as hashes:
        measured = measured_on(windows, weights, outline, report)
        report("tracing and translating")
        model = to_onnx(outline, config, measured, weights.pieces)
        report(f"writing {weight_bytes(model) / 1e6:,.0f} MB")

        def written(done: int, total: int) -> None:
            hashes.follow(done, total)
            progress(done, total)

        digests = save(model, folder / MODEL, weights_file(config), written)
        for name, content in companions(source.config, config, source.tokenizer_files).items():
            (folder / name).write_bytes(content)
        for path in source.tokenizer_files:
            shutil.copyfile(path, folder / path.name)
        report("checking and hashing")
        check(folder / MODEL)
        add_plain_file(folder / MODEL, config)
        if config.layout:
            check(for_transformers_js(folder, config))
        manifest = finish_manifest(folder, _manifest(source, config, model, outline, hashes()), digests)
    return Bundle(out, manifest)


def require_space(out: Path, needed: int) -> None:
    """Raises ExportError where the disk of `out` has less room than the weights take."""
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ExportError(
            f"{out} needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free on the disk",
            hint=f"Make room or choose another disk; --dtype {FP16.name} halves what float32 takes.",
        )


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all tensors in the graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def save(
    model: ir.Model, path: Path, weights: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Write `model` to `path`, and its large tensors, one at a time, to the file `weights` in the same folder or below;
    the SHA-256 of that file, by its name. `progress` is told how many bytes of tensors are written, and how many there
    are.

    Raises ExportError where the disk refuses.
    """
    values = {value: value.const_value for value in model.graph.initializers.values() if value.const_value is not None}
    total, data = weight_bytes(model), path.parent / weights
    try:
        data.parent.mkdir(exist_ok=True)
        with data.open("wb") as stream:
            file = HashedFile(stream)
            for (value, tensor), numbers in zip(values.items(), one_ahead(values.values()), strict=True):
                value.const_value = _written(tensor, numbers, file, weights, path.parent)
                progress(min(file.size, total), total)
        ir.save(model, path)
    except OSError as cause:
        raise ExportError(f"{path} cannot be written: {cause}", hint="Is there space on the disk?") from cause
    finally:
        for value, tensor in values.items():
            value.const_value = tensor
    return {weights: file.hexdigest()}


def _written(
    tensor: ir.TensorProtocol, numbers: ir.TensorProtocol, file: HashedFile, name: str, folder: Path
) -> ir.TensorProtocol:
    """Where in `file`, which is called `name` in a folder, a tensor's numbers now are; itself where it is small."""
    if tensor.nbytes <= INLINE_BYTES:
        return tensor
    assert isinstance(numbers, ir.Tensor | ir.PackedTensor | ir.LazyTensor)
    start = file.size
    numbers.tofile(file)
    return ir.ExternalTensor(
        name, start, file.size - start, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "",
        base_dir=folder,
    )  # fmt: skip


def check(path: Path) -> None:
    """Run ONNX's own checker on the file at `path`. Raises ExportError with what it says against it."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as cause:
        raise ExportError(f"the exported model is not valid ONNX: {cause}", hint=INVALID) from cause


def add_plain_file(model: Path, config: ExportConfig) -> None:
    """Write a copy of the portable file `model` for runtimes that do not have its dtype, under the name that
    `plain_file` gives; nothing where all have it. Raises ExportError where the copy is not valid.
    """
    if edits := passes.widening(config):
        check(passes.rewritten(model, model.with_name(plain_file(config)), edits))


def _manifest(
    source: Checkpoint, config: ExportConfig, model: ir.Model, outline: Decoder, hashes: dict[str, str]
) -> Manifest:
    spectra = [attention.rotary.spectrum.describe() for attention in outline.attentions()]
    return manifest_of(model, config, source.source(hashes), outline.config, spectra)


def manifest_of(
    model: ir.Model,
    config: ExportConfig,
    source: Source,
    what: ModelConfig | ModuleRecord,
    spectra: list[dict[str, Any]],
) -> Manifest:
    """The manifest of a bundle with the graph `model`, which was made of `source`; `what` is the decoder or module that
    it computes, `spectra` its position embeddings as plain data. `finish_manifest` adds the files.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=version("fope-export"),
        libraries={name: version(name) for name in LIBRARIES},
        source=source,
        model=what,
        spectra=spectra,
        export=config,
        inputs=[_port(value) for value in model.graph.inputs],
        outputs=[_port(value) for value in model.graph.outputs],
    )


def _port(value: ir.Value) -> Port:
    assert value.name and value.dtype and value.shape is not None
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return Port(name=value.name, dtype=value.dtype.name.lower(), shape=shape)


def to_onnx(
    model: Decoder,
    config: ExportConfig,
    measured: Measured = None,
    numbers: Numbers | None = None,
) -> ir.Model:
    """The decoder as an ONNX graph with the contract's names for inputs and outputs; batch, new tokens and past may be
    of any size. What was `measured` goes into the rounding of linear layers; `numbers` gives those of weights that
    `model` has on the device "meta".

    Weights are not copied: they are read when the result is saved, or here where they are quantized.
    """
    whole = without_numbers(model) if numbers else model
    traced = first_layers(whole) if repeats(whole) else whole
    inputs = ["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", traced.config)]
    outputs = ["logits", *cache_names("present", traced.config)]
    with quiet():
        program = trace(traced, config.capacity or 0, position_axes=config.position_axes)
        complete = partial(repeat, model=whole) if traced is not whole else None
        finished = lower(program, config, inputs, outputs, _dimensions, numbers, complete)
    if row := config.quantization:
        for edit in way_of(row).write(config, measured):
            edit(finished)
    if config.inline:
        finished = inlined(finished)
    finished.graph.name = "fope_decoder"
    spectrum = msgspec.json.encode(model.config.spectrum).decode()
    finished.metadata_props.update(
        {"fope.spectrum": spectrum, "fope.training_length": str(model.config.training_length)}
    )
    return finished


def lower(
    program: ExportedProgram,
    config: ExportConfig,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dimensions: Callable[[ir.Model], Mapping[str, str]],
    numbers: Numbers | None = None,
    complete: Callable[[ir.Graph], None] | None = None,
) -> ir.Model:
    """What torch traced, as an ONNX model: translated, optimized, and with every rotation a call of one function.

    Inputs and outputs get these names, in order. `dimensions` is given the translated model and says which of torch's
    symbols gets which name as a size. `numbers` are as for `to_onnx`; `complete` is given the translated graph first.

    Raises ExportError where the model writes to a buffer of its own.
    """
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=config.opset,
        optimize=False,
        verbose=False,
        custom_translation_table=TRANSLATIONS,
        input_names=inputs,
        output_names=outputs,
    )
    assert onnx_program is not None and onnx_program.exported_program is not None
    if written := onnx_program.exported_program.graph_signature.buffers_to_mutate:
        raise ExportError(
            f"the model writes to its buffer {next(iter(written.values()))}",
            hint="A graph has no memory: make it an input and an output.",
        )
    if complete:
        complete(onnx_program.model.graph)
    if numbers:
        give_numbers(onnx_program.model.graph, numbers)
    passes.TransposeWeights()(onnx_program.model)
    onnx_program.optimize()
    finish = Sequential(
        passes.ShareSpectra(),
        passes.AttachRotary(),
        passes.NameNodes(),
        passes.NameDimensions(dimensions(onnx_program.model)),
        ClearMetadataAndDocStringPass(),
        ShapeInferencePass(),
    )
    finished = finish(onnx_program.model).model
    finished.producer_name, finished.producer_version = "fope-export", version("fope-export")
    return finished


def trace(model: Decoder, capacity: int = 0, *, position_axes: bool = False) -> ExportedProgram:
    """What torch.export makes of the decoder: batch, new tokens and past may be of any size; with a `capacity`, in
    tokens, the cache is static and as long as that; with `position_axes`, tokens have positions on all axes.

    The sizes of the example are all different, so that none is taken for another.
    """
    batch, sequence, past, config = 2, 3, 5, model.config
    model = model.sharing()
    model.capacity = capacity
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    shape = (batch, config.num_kv_heads, capacity or past, config.spectrum.head_dim)
    dtype = model.embed.weight.dtype
    # One tensor given twice would be exported as one input.
    cache = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config.num_layers)]
    tokens = {0: Dim(BATCH), 1: Dim(SEQUENCE)}
    positions = torch.zeros(config.spectrum.axes, batch, sequence, dtype=torch.int64) if position_axes else ids.clone()
    kept = {0: Dim(BATCH)} if capacity else {0: Dim(BATCH), 2: Dim(PAST)}
    dynamic = {
        "input_ids": tokens,
        "attention_mask": {0: Dim(BATCH), 1: Dim.DYNAMIC},
        "position_ids": {1: Dim(BATCH), 2: Dim(SEQUENCE)} if position_axes else tokens,
        "past_key_values": [(kept,) * 2] * config.num_layers,
    }
    with torch.no_grad():
        return torch.export.export(model, (ids, mask, positions, cache), dynamic_shapes=dynamic, strict=False)


def cache_names(prefix: str, config: ModelConfig) -> list[str]:
    """prefix.0.key, prefix.0.value, prefix.1.key, …"""
    return [f"{prefix}.{i}.{part}" for i in range(config.num_layers) for part in ("key", "value")]


def _dimensions(model: ir.Model) -> dict[str, str]:
    """torch's symbol for each named size, read off the inputs."""
    inputs = {value.name: value.shape for value in model.graph.inputs}
    where = {
        BATCH: ("input_ids", 0),
        SEQUENCE: ("input_ids", 1),
        TOTAL: ("attention_mask", 1),
        PAST: ("past_key_values.0.key", 2),
    }
    symbols = {}
    for name, (value, axis) in where.items():
        shape = inputs[value]
        assert shape is not None
        if not isinstance(shape[axis], int):
            symbols[str(shape[axis])] = name
    return symbols


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's internal notes (a torchvision that is not needed, its own deprecations) and what an older onnxscript
    prints from the user's terminal, and the collector from going through what tracing makes again and again, of which
    almost nothing is garbage.
    """
    logger, collecting = logging.getLogger("torch.onnx._internal.exporter._registration"), gc.isenabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    gc.disable()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")
            yield
    finally:
        logger.setLevel(level)
        if collecting:
            gc.enable()
