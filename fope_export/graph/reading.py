"""The one door for ONNX files from outside: what they hold is held against their bytes, and where their weights lie."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto

from fope_export.bundle import Bundle
from fope_export.documents import check_file
from fope_export.errors import BundleError, cut
from fope_export.manifest import OPTIMISED

LARGEST = (1 << 31) - 1
"""Bytes that protobuf allows a message."""
AGAIN = "Export the checkpoint again, or copy the file again with all files beside it."
BITS: dict[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}
"""Element types that share bytes."""
VARIABLE = (TensorProto.UNDEFINED, TensorProto.STRING)


def read_onnx(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external weights, which are known to be there.

    Raises BundleError where it is none, where a function calls itself, or where a tensor is not stored whole: its
    element type, its size, and for external data a regular file with enough bytes in the same folder.
    """
    size = check_file(path, raises=BundleError, hint=AGAIN)
    if size > LARGEST:
        raise BundleError(f"{path} has {size:,} bytes, and an ONNX file is smaller than 2 GB", hint=AGAIN)
    try:
        model = onnx.load(path, "protobuf", load_external_data=False)  # whatever its name
    except (DecodeError, ValueError) as cause:
        raise BundleError(f"{path}: not a valid ONNX file: {cut(cause)}", hint=AGAIN) from cause
    if not model.graph.node and not model.graph.output:
        raise BundleError(f"{path}: not a valid ONNX file: it has no graph", hint=AGAIN)
    for tensor in _tensors(model):
        if reason := _reason_against(tensor, path.parent):
            raise BundleError(f"{path}: tensor {cut(tensor.name) or 'without a name'} {reason}", hint=AGAIN)
    _check_calls(model, path)
    return model


def check_graphs(bundle: Bundle) -> None:
    """Raises BundleError as `read_onnx` does, for any of a bundle's ONNX files, and where the first has other inputs
    and outputs than the manifest says.
    """
    graph = read_onnx(bundle.model).graph
    found = {value.name: _extents(value) for value in (*graph.input, *graph.output)}
    for port in (*bundle.manifest.inputs, *bundle.manifest.outputs):
        sizes = found.get(port.name)
        wanted = [size if isinstance(size, int) else None for size in port.shape]
        if sizes != wanted:
            raise BundleError(
                f"{bundle.model}: {cut(port.name)} has sizes {cut(sizes)}, and {wanted} in the manifest", hint=AGAIN
            )
    if OPTIMISED in bundle.manifest.files:
        read_onnx(bundle.path / OPTIMISED)


def _extents(value: onnx.ValueInfoProto) -> list[int | None]:
    """The sizes of a graph's input or output; None where they are symbolic."""
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else None for size in sizes]


def load_onnx(path: Path) -> ir.Model:
    """The same as a graph to work on, its weights mapped from the disk. Raises BundleError as `read_onnx` does."""
    read_onnx(path)
    try:
        return ir.load(path)
    except (ValueError, TypeError, KeyError, AttributeError, ir.serde.SerdeError) as cause:
        raise BundleError(f"{path}: not a valid ONNX graph: {cut(cause)}", hint=AGAIN) from cause


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of graphs within them; protobuf has seen to it that these end."""
    for node in nodes:
        yield node
        for graph in (graph for each in node.attribute for graph in (each.g, *each.graphs)):
            yield from _nodes(graph.node)


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Of the whole model, wherever they are kept."""
    nodes = [*_nodes(model.graph.node), *(node for each in model.functions for node in _nodes(each.node))]
    attributes = [attribute for node in nodes for attribute in node.attribute]
    for graph in (model.graph, *(graph for each in attributes for graph in (each.g, *each.graphs))):
        yield from graph.initializer
        yield from (tensor for sparse in graph.sparse_initializer for tensor in (sparse.values, sparse.indices))
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors) if attribute.type in TENSORS else ()


TENSORS = (AttributeProto.TENSOR, AttributeProto.TENSORS)


def _reason_against(tensor: TensorProto, folder: Path) -> str:
    """Why a tensor is not stored whole, or nothing."""
    if tensor.data_type in VARIABLE:
        return "has no element type" if tensor.dims and not tensor.string_data else ""
    if tensor.data_type not in TensorProto.DataType.values():
        return f"has the unknown element type {tensor.data_type}"
    if any(size < 0 for size in tensor.dims):
        return f"has the shape {list(tensor.dims)}"
    promised = promised_bytes(tensor)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _reason_against_external({each.key: each.value for each in tensor.external_data}, promised, folder)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != promised:
        return f"needs {promised:,} bytes, and has {len(tensor.raw_data):,}"
    if not tensor.HasField("raw_data") and math.prod(tensor.dims) > sum(map(len, _fields(tensor))) * 8:
        return f"has the shape {list(tensor.dims)}, and not the numbers for it"
    return ""


def _fields(tensor: TensorProto) -> tuple[Any, ...]:
    return tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data


def promised_bytes(tensor: TensorProto) -> int:
    """What a tensor's shape and element type take."""
    bits = BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    total: int = -(-math.prod(tensor.dims) * bits // 8)
    return total


def _reason_against_external(place: Mapping[str, str], promised: int, folder: Path) -> str:
    name = place.get("location", "")
    if not _stays(name):
        return f"lies in {cut(repr(name))}, outside of the folder"
    try:
        offset, length = (int(place.get(key) or default) for key, default in (("offset", 0), ("length", promised)))
        size = check_file(folder / name, raises=BundleError, hint=AGAIN)
    except (ValueError, BundleError) as cause:
        return f"has no place that can be read: {cut(cause)}"
    if length != promised or not 0 <= offset <= size - promised:
        return f"needs {promised:,} bytes; {name}, which has {size:,}, is to give {length:,} from {offset:,} on"
    return ""


def _stays(name: str) -> bool:
    """Whether a file's name leads to no other folder, on any system."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    anchored = PurePosixPath(name).anchor or PureWindowsPath(name).anchor
    return bool(name) and not anchored and ".." not in parts


def _check_calls(model: onnx.ModelProto, path: Path) -> None:
    """Raises BundleError for a function that comes back to itself: to inline it would never end."""
    bodies = {(f.domain, f.name): {(node.domain, node.op_type) for node in _nodes(f.node)} for f in model.functions}
    while ends := [name for name, called in bodies.items() if not called & bodies.keys()]:
        for name in ends:
            del bodies[name]
    if bodies:
        domain, name = min(bodies)
        raise BundleError(f"{path}: function {cut(domain)}::{cut(name)} calls itself", hint=AGAIN)
