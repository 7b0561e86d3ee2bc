"""Checkpoint to bundle: torch.export, torch.onnx, passes, checker, manifest."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import msgspec
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, ShapeInferencePass
from torch.export import Dim, ExportedProgram

from fope_export.bundle import FORMAT_VERSION, MODEL, Bundle, Manifest, Port, Source, check_target, complete, creating
from fope_export.config import ExportConfig, ModelConfig
from fope_export.errors import ExportError
from fope_export.graph import passes
from fope_export.graph.companions import companions
from fope_export.graph.translation import TRANSLATIONS
from fope_export.model.checkpoint import Checkpoint, load_checkpoint
from fope_export.model.decoder import Decoder

INLINE_BYTES = 1024
"""Smaller tensors stay in model.onnx; the others go to model.onnx.data."""
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"


def export(
    checkpoint: str | Path,
    out: str | Path,
    config: ExportConfig | None = None,
    *,
    report: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Write the bundle of the checkpoint in folder `checkpoint` to folder `out`, whole or not at all.

    A bundle that stands there is replaced; the same checkpoint gives the same bytes. `report` is told each stage.

    Raises CheckpointError, ConfigError, BundleError or ExportError; then `out` is as it was.
    """
    out = Path(out)
    check_target(out)
    report("reading the checkpoint")
    source = load_checkpoint(checkpoint)
    config = (config or ExportConfig()).resolved(source.config.training_length)
    report("tracing and translating")
    model = to_onnx(source.model.as_exported(config), config)
    with creating(out) as folder:
        report(f"writing {sum(p.nbytes for p in source.model.parameters()) / 1e6:,.0f} MB")
        _save(model, folder / MODEL)
        for name, content in companions(source.config, config).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for path in source.tokenizer_files:
            shutil.copyfile(path, folder / path.name)
        report("checking and hashing")
        _check(folder / MODEL)
        manifest = complete(folder, _manifest(source, config, model))
    return Bundle(out, manifest)


def _save(model: ir.Model, path: Path) -> None:
    try:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=INLINE_BYTES)
    except OSError as cause:
        raise ExportError(f"{path} cannot be written: {cause}", hint="Is there space on the disk?") from cause


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as cause:
        raise ExportError(f"the exported model is not valid ONNX: {cause}", hint="Please report it.") from cause


def _manifest(source: Checkpoint, config: ExportConfig, model: ir.Model) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=version("fope-export"),
        libraries={name: version(name) for name in LIBRARIES},
        source=Source(path=str(source.path.resolve()), dialect=source.dialect, files=source.hashes()),
        model=source.config,
        spectra=[attention.rotary.spectrum.describe() for attention in source.model.attentions()],
        export=config,
        inputs=[_port(value) for value in model.graph.inputs],
        outputs=[_port(value) for value in model.graph.outputs],
    )


def _port(value: ir.Value) -> Port:
    assert value.name and value.dtype and value.shape is not None
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return Port(name=value.name, dtype=value.dtype.name.lower(), shape=shape)


def to_onnx(model: Decoder, config: ExportConfig) -> ir.Model:
    """The decoder as an ONNX model with the contract's names, symbolic in batch, sequence and past.

    Weights stay where `model` has them; they are read when the result is saved.
    """
    with _quiet():
        program = trace(model, config.capacity or 0)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=config.opset,
            optimize=False,
            verbose=False,
            custom_translation_table=TRANSLATIONS,
            input_names=["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", model.config)],
            output_names=["logits", *cache_names("present", model.config)],
        )
        assert onnx_program is not None
        passes.TransposeWeights()(onnx_program.model)
        onnx_program.optimize()
    finish = Sequential(
        passes.ShareSpectra(),
        passes.AttachRotary(),
        passes.NameNodes(),
        passes.NameDimensions(_dimensions(onnx_program.model)),
        ClearMetadataAndDocStringPass(),
        ShapeInferencePass(),
    )
    finished = finish(onnx_program.model).model
    finished.graph.name = "fope_decoder"
    finished.producer_name, finished.producer_version = "fope-export", version("fope-export")
    spectrum = msgspec.json.encode(model.config.spectrum).decode()
    finished.metadata_props.update(
        {"fope.spectrum": spectrum, "fope.training_length": str(model.config.training_length)}
    )
    return finished


def trace(model: Decoder, capacity: int = 0) -> ExportedProgram:
    """torch.export with symbolic sizes, and a static cache if it has a `capacity`.

    The example's sizes are all different, so that none is taken for another.
    """
    batch, sequence, past, config = 2, 3, 5, model.config
    model.capacity = capacity
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    shape = (batch, config.num_kv_heads, capacity or past, config.spectrum.head_dim)
    dtype = model.embed.weight.dtype
    # One tensor given twice would be exported as one input.
    cache = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config.num_layers)]
    tokens = {0: Dim(BATCH), 1: Dim(SEQUENCE)}
    kept = {0: Dim(BATCH)} if capacity else {0: Dim(BATCH), 2: Dim(PAST)}
    dynamic = {
        "input_ids": tokens,
        "attention_mask": {0: Dim(BATCH), 1: Dim.DYNAMIC},
        "position_ids": tokens,
        "past_key_values": [(kept,) * 2] * config.num_layers,
    }
    with torch.no_grad():
        return torch.export.export(model, (ids, mask, ids.clone(), cache), dynamic_shapes=dynamic, strict=False)


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
    found = {}
    for name, (value, axis) in where.items():
        shape = inputs[value]
        assert shape is not None
        if not isinstance(shape[axis], int):
            found[str(shape[axis])] = name
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's internal notes (a torchvision that is not needed, its own deprecations) from the user's terminal."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")
            yield
    finally:
        logger.setLevel(level)
