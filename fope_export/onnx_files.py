"""The one door for ONNX files from outside: what they hold is held against their bytes, and where their weights lie.

It needs protobuf and no ONNX: of its messages it knows the fields that are looked at.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from fope_export.bundle import Bundle
from fope_export.documents import check_file
from fope_export.errors import BundleError, cut
from fope_export.manifest import MODEL, ROUNDED_CACHE, TRANSFORMERS_JS, plain_file

LARGEST = (1 << 31) - 1
"""Bytes that protobuf allows a message."""
AGAIN = "Export the checkpoint again, or copy the file again with all files beside it."
MESSAGES: dict[str, str] = {
    "ModelProto": "graph 7 GraphProto, functions 25 *FunctionProto",
    "GraphProto": (
        "node 1 *NodeProto, initializer 5 *TensorProto, input 11 *ValueInfoProto, output 12 *ValueInfoProto, "
        "sparse_initializer 15 *SparseTensorProto"
    ),
    "FunctionProto": "name 1 string, node 7 *NodeProto, domain 10 string",
    "NodeProto": "op_type 4 string, attribute 5 *AttributeProto, domain 7 string",
    "AttributeProto": "t 5 TensorProto, g 6 GraphProto, tensors 10 *TensorProto, graphs 11 *GraphProto, type 20 int32",
    "TensorProto": (
        "dims 1 *int64, data_type 2 int32, float_data 4 *float, int32_data 5 *int32, string_data 6 *bytes, "
        "int64_data 7 *int64, name 8 string, raw_data 9 bytes, double_data 10 *double, uint64_data 11 *uint64, "
        "external_data 13 *StringStringEntryProto, data_location 14 int32"
    ),
    "SparseTensorProto": "values 1 TensorProto, indices 2 TensorProto",
    "StringStringEntryProto": "key 1 string, value 2 string",
    "ValueInfoProto": "name 1 string, type 2 TypeProto",
    "TypeProto": "tensor_type 1 TensorTypeProto",
    "TensorTypeProto": "shape 2 TensorShapeProto",
    "TensorShapeProto": "dim 1 *DimensionProto",
    "DimensionProto": "dim_value 1 int64",
}
"""Message -> fields: name, number, type, * for repeated."""
BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24, 27, 28), 8), **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32), **dict.fromkeys((7, 11, 13, 14), 64), 15: 128,
    **dict.fromkeys((21, 22, 23), 4), **dict.fromkeys((25, 26), 2),
}  # fmt: skip
"""Of a number, by ONNX's number of the element type."""
UNDEFINED, STRING = 0, 8
"""Element types without a size."""
EXTERNAL = 1
"""The data_location of a tensor that lies in another file."""
TENSORS = (4, 9)
"""Types of attributes that are a tensor, or several."""

Message: TypeAlias = Any
"""One of MESSAGES."""


@cache
def _model() -> type[Message]:
    """The class of an ONNX file, in a pool of its own, so that ONNX may have another."""
    file = FileDescriptorProto(name="onnx.proto", package="onnx")
    for message, fields in MESSAGES.items():
        made = file.message_type.add(name=message)
        for name, number, kind in (field.split() for field in fields.split(", ")):
            one, repeated = kind.removeprefix("*"), kind.startswith("*")
            field = made.field.add(name=name, number=int(number), label=3 if repeated else 1)
            if one in MESSAGES:
                field.type_name = f".onnx.{one}"
            else:
                field.type = FieldDescriptorProto.Type.Value(f"TYPE_{one.upper()}")
    pool = DescriptorPool()
    pool.Add(file)
    made_class: type[Message] = GetMessageClass(pool.FindMessageTypeByName("onnx.ModelProto"))
    return made_class


def check_onnx(path: Path) -> Message:
    """The graph and functions of an ONNX file, whose external weights are known to be there.

    Raises BundleError where it is none, where a function calls itself, or where a tensor is not stored whole: its
    element type, its size, and for external data a regular file with enough bytes in the same folder.
    """
    size = check_file(path, raises=BundleError, hint=AGAIN)
    if size > LARGEST:
        raise BundleError(f"{path} has {size:,} bytes, and an ONNX file is smaller than 2 GB", hint=AGAIN)
    try:
        model = _model().FromString(path.read_bytes())
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
    """Raises BundleError as `check_onnx` does, for any of a bundle's ONNX files, where the first has other inputs and
    outputs than the manifest says, and where the one for transformers.js is another graph.
    """
    graph = check_onnx(bundle.model).graph
    shapes = {value.name: _extents(value) for value in (*graph.input, *graph.output)}
    for port in (*bundle.manifest.inputs, *bundle.manifest.outputs):
        sizes = shapes.get(port.name)
        wanted = [size if isinstance(size, int) else None for size in port.shape]
        if sizes != wanted:
            raise BundleError(
                f"{bundle.model}: {cut(port.name)} has sizes {cut(sizes)}, and {wanted} in the manifest", hint=AGAIN
            )
    for name in {plain_file(bundle.manifest.export), bundle.manifest.optimized, ROUNDED_CACHE} - {MODEL}:
        if name in bundle.manifest.files:
            check_onnx(bundle.path / name)
    if TRANSFORMERS_JS in bundle.manifest.files:
        copy, plain = bundle.path / TRANSFORMERS_JS, bundle.path / plain_file(bundle.manifest.export)
        if _computed(check_onnx(copy)) != _computed(check_onnx(plain)):
            raise BundleError(f"{copy} does not compute what {plain.name} does", hint=AGAIN)


def _computed(model: Message) -> list[bytes]:
    """What a file from `check_onnx` computes: its nodes, functions and weights, wherever the file with these lies."""
    for tensor in model.graph.initializer:
        for place in tensor.external_data:
            if place.key == "location":
                place.value = ""
    parts = (*model.graph.node, *model.functions, *model.graph.initializer)
    return [part.SerializeToString(deterministic=True) for part in parts]


def _extents(value: Message) -> list[int | None]:
    """The sizes of a graph's input or output; None where they are symbolic."""
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else None for size in sizes]


def _nodes(nodes: Iterable[Message]) -> Iterator[Message]:
    """Nodes, and those of graphs within them; protobuf has seen to it that these end."""
    for node in nodes:
        yield node
        for graph in (graph for each in node.attribute for graph in (each.g, *each.graphs)):
            yield from _nodes(graph.node)


def _tensors(model: Message) -> Iterator[Message]:
    """Of the whole model, wherever they are kept."""
    nodes = [*_nodes(model.graph.node), *(node for each in model.functions for node in _nodes(each.node))]
    attributes = [attribute for node in nodes for attribute in node.attribute]
    for graph in (model.graph, *(graph for each in attributes for graph in (each.g, *each.graphs))):
        yield from graph.initializer
        yield from (tensor for sparse in graph.sparse_initializer for tensor in (sparse.values, sparse.indices))
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors) if attribute.type in TENSORS else ()


def _reason_against(tensor: Message, folder: Path) -> str:
    """Why a tensor is not stored whole, or nothing."""
    if tensor.data_type in (UNDEFINED, STRING):
        return "has no element type" if tensor.dims and not tensor.string_data else ""
    if tensor.data_type not in BITS:
        return f"has the unknown element type {tensor.data_type}"
    if any(size < 0 for size in tensor.dims):
        return f"has the shape {list(tensor.dims)}"
    promised = promised_bytes(tensor)
    if tensor.data_location == EXTERNAL:
        return _reason_against_external({each.key: each.value for each in tensor.external_data}, promised, folder)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != promised:
        return f"needs {promised:,} bytes, and has {len(tensor.raw_data):,}"
    if not tensor.HasField("raw_data") and math.prod(tensor.dims) > sum(map(len, _fields(tensor))) * 8:
        return f"has the shape {list(tensor.dims)}, and not the numbers for it"
    return ""


def _fields(tensor: Message) -> tuple[Any, ...]:
    return tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data


def promised_bytes(tensor: Message) -> int:
    """What a tensor's shape and element type take; of strings nobody knows."""
    total: int = -(-math.prod(tensor.dims) * BITS.get(tensor.data_type, 0) // 8)
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


def _check_calls(model: Message, path: Path) -> None:
    """Raises BundleError for a function that comes back to itself: to inline it would never end."""
    bodies = {(f.domain, f.name): {(node.domain, node.op_type) for node in _nodes(f.node)} for f in model.functions}
    while ends := [name for name, called in bodies.items() if not called & bodies.keys()]:
        for name in ends:
            del bodies[name]
    if bodies:
        domain, name = min(bodies)
        raise BundleError(f"{path}: function {cut(domain)}::{cut(name)} calls itself", hint=AGAIN)
