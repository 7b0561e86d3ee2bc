"""What a checkpoint, a bundle or an ONNX file is: as plain data, and in words."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from rich.filesize import decimal

from fope_export.bundle import Bundle
from fope_export.config import ModelConfig, SpectrumConfig
from fope_export.errors import FopeError, cut
from fope_export.links import loadable
from fope_export.manifest import MANIFEST, Manifest
from fope_export.onnx_files import promised_bytes
from fope_export.tensorrt.record import EngineRecord, records

if TYPE_CHECKING:
    import onnx

Sections = dict[str, dict[str, Any]]
"""Title -> what is said under it, by name."""
GIVE = "Give a checkpoint, a bundle or a .onnx file."


class CheckpointDescription(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="checkpoint"):
    """A checkpoint, as it was read."""

    path: str
    layout: str
    parameters: int
    model: ModelConfig
    reading: Mapping[str, str]
    """In words, whose reading of the configuration was taken, and what was done to the coefficients."""
    spectrum: dict[str, Any]
    """The first layer's: `freq` in rad per token, and the SHA-256 of the coefficients."""
    tensors: dict[str, list[int]]
    """Shapes, of all layers."""
    bytes: dict[str, int]
    sha256: dict[str, str]


class BundleDescription(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="bundle"):
    """A bundle: its manifest, and what its files are."""

    path: str
    manifest: Manifest
    engines: tuple[EngineRecord, ...]
    bytes: dict[str, int | None]
    """Of each file of the manifest; None where it is missing."""
    damaged: dict[str, str]
    """Files that are not what the manifest says, with the reason."""


class ValueDescription(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output; named sizes are symbolic, and 0 is one that is not known."""

    dtype: str
    shape: list[int | str]


class OnnxDescription(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="onnx"):
    """An ONNX file."""

    path: str
    bytes: int
    producer: str
    opsets: dict[str, int]
    """By domain."""
    weight_bytes: int
    """Those in files beside it too."""
    inputs: dict[str, ValueDescription]
    outputs: dict[str, ValueDescription]
    nodes: dict[str, int]
    """How many there are of each operator."""
    functions: dict[str, int]
    """How many nodes each has."""
    metadata: dict[str, str]


Description: TypeAlias = CheckpointDescription | BundleDescription | OnnxDescription


def inspect(path: str | Path) -> Description:
    """Describe the checkpoint, bundle or ONNX file at `path`. Raises FopeError when it is none of them."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _bundle(Bundle.open(path, verify=False))
    if path.exists() and not path.is_dir():
        return _onnx(path)
    return _checkpoint(path)


def in_words(description: Description) -> Sections:
    """What is printed of it."""
    match description:
        case CheckpointDescription():
            return _checkpoint_in_words(description)
        case BundleDescription():
            return _bundle_in_words(description)
        case _:
            return _onnx_in_words(description)


def _checkpoint(path: Path) -> CheckpointDescription:
    from fope_export.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    checkpoint.weights.check()
    model = checkpoint.outline
    return CheckpointDescription(
        path=str(path),
        layout=checkpoint.layout,
        parameters=sum(p.numel() for p in model.parameters()),
        model=checkpoint.config,
        reading=checkpoint.reading,
        spectrum=model.attentions()[0].rotary.spectrum.describe(),
        tensors={name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        bytes={file.name: file.stat().st_size for file in checkpoint.files},
        sha256=checkpoint.hashes(),
    )


def _checkpoint_in_words(it: CheckpointDescription) -> Sections:
    layer = "layers.0."
    shared = sum(layer in name for name in it.tensors)
    shown = [name for name in it.tensors if "layers." not in name or name.startswith(layer)]
    return {
        "checkpoint": {"path": it.path, "layout": it.layout, "parameters": f"{it.parameters:,}"},
        "model": _model(it.model),
        "spectrum": {**it.reading, **_spectrum(it.model.spectrum, it.spectrum)},
        f"tensors (of {it.model.num_layers} layers with {shared} each, the first)": {
            name: " x ".join(map(str, it.tensors[name])) for name in shown
        },
        "files": {name: f"{decimal(it.bytes[name])}  {digest}" for name, digest in it.sha256.items()},
    }


def _bundle(bundle: Bundle) -> BundleDescription:
    paths = {name: bundle.path / name for name in bundle.manifest.files}
    return BundleDescription(
        path=str(bundle.path),
        manifest=bundle.manifest,
        engines=tuple(records(bundle)),
        bytes={name: path.stat().st_size if path.is_file() else None for name, path in paths.items()},
        damaged=bundle.damaged(),
    )


def _bundle_in_words(it: BundleDescription) -> Sections:
    manifest, source = it.manifest, it.manifest.source
    sizes = {name: "missing" if size is None else decimal(size) for name, size in it.bytes.items()}
    return {
        "bundle": {
            "path": it.path,
            "made by": f"fope-export {manifest.tool_version}",
            "from": f"{source.path} ({source.layout})",
            **({"with the adapter": source.adapter.path} if source.adapter else {}),
            "written as": _written(manifest),
            **({"keys and values": manifest.cache} if manifest.cache else {}),
        },
        **_what(manifest),
        "inputs": {port.name: _port(port.dtype, port.shape) for port in manifest.inputs},
        "outputs": {port.name: _port(port.dtype, port.shape) for port in manifest.outputs},
        "engines": {record.target: record.described for record in it.engines},
        "files": {
            name: f"{sizes[name]}  {digest}" + (f"  {it.damaged[name].upper()}" if name in it.damaged else "")
            for name, digest in manifest.files.items()
        },
    }


def _written(manifest: Manifest) -> str:
    export = manifest.export
    return export.described if isinstance(manifest.model, ModelConfig) else f"opset {export.opset}, {export.dtype}"


def _what(manifest: Manifest) -> Sections:
    """The decoder or the module, and its first rotation."""
    numbers, model = manifest.spectra[0], manifest.model
    if isinstance(model, ModelConfig):
        return {"model": _model(model), "spectrum": _spectrum(model.spectrum, numbers)}
    sizes = {name: f"from {e.min}" + (f" to {e.max}" if e.max else "") for name, e in model.sizes.items()}
    rotations = {"FopeRotary": f"{len(model.rotations)}, called {model.calls} times"}
    first, config = next(iter(model.rotations.items()))
    return {"module": rotations, "sizes": sizes, f"spectrum of {first}": _spectrum(config, numbers)}


def _onnx(path: Path) -> OnnxDescription:
    import onnx

    from fope_export.graph.reading import read_onnx

    model = read_onnx(path)
    try:
        data = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
        onnx.checker.check_model(loadable(path, *sorted(data)))
    except (onnx.checker.ValidationError, OSError) as cause:
        raise FopeError(f"{path}: not a valid ONNX file: {cut(' '.join(str(cause).split()))}", hint=GIVE) from cause
    counted = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph.node)
    return OnnxDescription(
        path=str(path),
        bytes=path.stat().st_size,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        weight_bytes=sum(promised_bytes(t) for t in model.graph.initializer),
        inputs=_values(model.graph.input),
        outputs=_values(model.graph.output),
        nodes=dict(counted.most_common()),
        functions={f"{f.domain}::{f.name}": len(f.node) for f in model.functions},
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _onnx_in_words(it: OnnxDescription) -> Sections:
    return {
        "onnx": {
            "path": it.path,
            "size": decimal(it.bytes),
            "made by": it.producer,
            "opsets": ", ".join(f"{domain} {version}" for domain, version in it.opsets.items()),
            "weights": decimal(it.weight_bytes),
        },
        "inputs": {name: _port(value.dtype, value.shape) for name, value in it.inputs.items()},
        "outputs": {name: _port(value.dtype, value.shape) for name, value in it.outputs.items()},
        "nodes": dict(it.nodes),
        "functions": {name: f"{count} nodes" for name, count in it.functions.items()},
        "metadata": dict(it.metadata),
    }


def _model(config: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(config)
    return {name: value for name, value in fields.items() if name not in ("spectrum", "model_type")}


def _spectrum(config: SpectrumConfig, numbers: dict[str, Any]) -> dict[str, Any]:
    freq = numbers["freq"]
    described = {
        "frequencies": f"{len(freq)}" + (f", from {freq[0]:.4g} to {freq[-1]:.4g} rad per token" if freq else ""),
    }
    fields: dict[str, Any] = msgspec.to_builtins(config)
    return fields | described | {name: value for name, value in numbers.items() if name != "freq"}


def _port(dtype: str, shape: list[int | str]) -> str:
    return f"{dtype} [{', '.join(map(str, shape))}]"


def _values(values: "Iterable[onnx.ValueInfoProto]") -> dict[str, ValueDescription]:
    from onnx import TensorProto

    names = {number: name.lower() for name, number in TensorProto.DataType.items()}
    tensors = {value.name: value.type.tensor_type for value in values}
    return {
        name: ValueDescription(
            dtype=names.get(tensor.elem_type, str(tensor.elem_type)),
            shape=[dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
        )
        for name, tensor in tensors.items()
    }
