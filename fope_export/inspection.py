"""What a checkpoint, a bundle or an ONNX file is, as plain data."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.filesize import decimal

from fope_export.bundle import Bundle
from fope_export.config import ModelConfig, SpectrumConfig
from fope_export.errors import FopeError, cut
from fope_export.links import loadable
from fope_export.manifest import MANIFEST, Manifest
from fope_export.onnx_files import promised_bytes
from fope_export.tensorrt.record import records

if TYPE_CHECKING:
    import onnx

Description = dict[str, dict[str, Any]]
"""Section -> what it says."""
GIVE = "Give a checkpoint, a bundle or a .onnx file."


def inspect(path: str | Path) -> Description:
    """Describe the checkpoint, bundle or ONNX file at `path`. Raises FopeError when it is none of them."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _bundle(Bundle.open(path, verify=False))
    if path.exists() and not path.is_dir():
        return _onnx(path)
    return _checkpoint(path)


def _checkpoint(path: Path) -> Description:
    from fope_export.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    checkpoint.weights.check()
    model = checkpoint.outline
    parameters = sum(p.numel() for p in model.parameters())
    spectrum = model.attentions()[0].rotary.spectrum
    tensors = {name: " x ".join(map(str, t.shape)) for name, t in model.state_dict().items()}
    shared = sum("layers.0." in name for name in tensors)
    shown = {name: shape for name, shape in tensors.items() if "layers." not in name or name.startswith("layers.0.")}
    return {
        "checkpoint": {"path": str(path), "layout": checkpoint.layout, "parameters": f"{parameters:,}"},
        "model": _model(checkpoint.config),
        "spectrum": {**checkpoint.reading, **_spectrum(checkpoint.config.spectrum, spectrum.describe())},
        f"tensors (of {checkpoint.config.num_layers} layers with {shared} each, the first)": shown,
        "files": {
            p.name: f"{_size(p)}  {digest}"
            for p, digest in zip(checkpoint.files, checkpoint.hashes().values(), strict=True)
        },
    }


def _bundle(bundle: Bundle) -> Description:
    manifest, damaged = bundle.manifest, bundle.damaged()
    return {
        "bundle": {
            "path": str(bundle.path),
            "made by": f"fope-export {manifest.tool_version}",
            "from": f"{manifest.source.path} ({manifest.source.layout})",
            **({"with the adapter": manifest.source.adapter.path} if manifest.source.adapter else {}),
            "written as": _written(manifest),
            **({"keys and values": manifest.cache} if manifest.cache else {}),
        },
        **_what(manifest),
        "inputs": {port.name: _port(port.dtype, port.shape) for port in manifest.inputs},
        "outputs": {port.name: _port(port.dtype, port.shape) for port in manifest.outputs},
        "engines": {record.target: record.described for record in records(bundle)},
        "files": {
            name: f"{_size(bundle.path / name)}  {digest}" + (f"  {damaged[name].upper()}" if name in damaged else "")
            for name, digest in manifest.files.items()
        },
    }


def _written(manifest: Manifest) -> str:
    export = manifest.export
    return export.described if isinstance(manifest.model, ModelConfig) else f"opset {export.opset}, {export.dtype}"


def _what(manifest: Manifest) -> Description:
    """The decoder or the module, and its first rotation."""
    numbers, model = manifest.spectra[0], manifest.model
    if isinstance(model, ModelConfig):
        return {"model": _model(model), "spectrum": _spectrum(model.spectrum, numbers)}
    sizes = {name: f"from {e.min}" + (f" to {e.max}" if e.max else "") for name, e in model.sizes.items()}
    rotations = {"FopeRotary": f"{len(model.rotations)}, called {model.calls} times"}
    first, config = next(iter(model.rotations.items()))
    return {"module": rotations, "sizes": sizes, f"spectrum of {first}": _spectrum(config, numbers)}


def _onnx(path: Path) -> Description:
    import onnx

    from fope_export.graph.reading import read_onnx

    model = read_onnx(path)
    try:
        data = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
        onnx.checker.check_model(loadable(path, *sorted(data)))
    except (onnx.checker.ValidationError, OSError) as cause:
        raise FopeError(f"{path}: not a valid ONNX file: {cut(' '.join(str(cause).split()))}", hint=GIVE) from cause
    counted = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph.node)
    return {
        "onnx": {
            "path": str(path),
            "size": _size(path),
            "made by": f"{model.producer_name} {model.producer_version}".strip(),
            "opsets": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
            "weights": decimal(sum(promised_bytes(t) for t in model.graph.initializer)),
        },
        "inputs": {value.name: _value(value) for value in model.graph.input},
        "outputs": {value.name: _value(value) for value in model.graph.output},
        "nodes": {name: str(count) for name, count in counted.most_common()},
        "functions": {f"{f.domain}::{f.name}": f"{len(f.node)} nodes" for f in model.functions},
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
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


def _value(value: "onnx.ValueInfoProto") -> str:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    names = {number: name.lower() for name, number in TensorProto.DataType.items()}
    return _port(names.get(tensor.elem_type, str(tensor.elem_type)), shape)


def _size(path: Path) -> str:
    return decimal(path.stat().st_size) if path.is_file() else "missing"
