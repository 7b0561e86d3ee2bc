"""Graph edits as passes: named, in memory, each with what it needs and what it promises."""

import ast
import os.path
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, Sequential

from fope_export.dtypes import Dtype
from fope_export.fope import contract
from fope_export.graph.reading import load_onnx
from fope_export.graph.translation import function

NUMBERS = [i for i, port in enumerate(contract.INPUTS) if port.dtype == "float32"]
"""The ports of a FopeRotary call that take the spectrum's numbers."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch.onnx leaves the path of the module that a node came from."""


class TransposeWeights(InPlacePass):
    """Store each linear layer's weight as its MatMul reads it, under the name `<weight>.T`.

    The transposed copy is made when the file is written, one weight at a time.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph, made = model.graph, False
        for node in list(graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            tensor = weight.const_value if weight is not None and weight.is_initializer() else None
            if tensor is None or tuple(node.attributes["perm"].as_ints()) != (1, 0):
                continue
            name = f"{tensor.name}.T"
            if name not in graph.initializers:
                graph.register_initializer(_transposed(tensor, name))
            node.outputs[0].replace_all_uses_with(graph.initializers[name])
            graph.remove(node, safe=True)
            made = True
        drop_unused(graph)
        return PassResult(model, made)


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.Value:
    rows, columns = tensor.shape.numpy()
    shape = ir.Shape((columns, rows))

    def read() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=name)

    lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)


def drop_unused(graph: ir.Graph) -> bool:
    """Remove initializers that nothing reads; whether there were any."""
    unused = [name for name, value in graph.initializers.items() if not value.uses()]
    for name in unused:
        graph.initializers.pop(name)
    return bool(unused)


class AttachRotary(InPlacePass):
    """Give the model the function that its FopeRotary calls name, and check that every call can reach a plugin."""

    def call(self, model: ir.Model) -> PassResult:
        body = function(model.opset_imports[""])
        model.functions[body.identifier()] = body
        model.opset_imports[contract.DOMAIN] = contract.VERSION
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        calls = [node for node in model.graph if node.domain == contract.DOMAIN]
        if not calls:
            raise PostconditionError(f"the model makes no call of {contract.DOMAIN}::{contract.NAME}")
        for node in calls:
            found = {key: node.attributes[key].as_string() for key in contract.DISPATCH if key in node.attributes}
            if found != contract.DISPATCH:
                raise PostconditionError(
                    f"{node.name} carries {found}, not {contract.DISPATCH}: no plugin would be found"
                )


class Widen(InPlacePass):
    """Every value of one dtype gets another, in the main graph; FopeRotary's body follows its attribute."""

    def __init__(self, narrow: Dtype, wide: Dtype) -> None:
        super().__init__()
        self._narrow, self._wide = narrow, wide

    def call(self, model: ir.Model) -> PassResult:
        graph, narrow, wide = model.graph, element_of(self._narrow), element_of(self._wide)
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            if value.dtype == narrow:
                value.dtype = wide
            if (tensor := value.const_value) is not None and tensor.dtype == narrow:
                value.const_value = ir.LazyTensor(
                    partial(_converted, tensor, wide), wide, ir.Shape(tensor.shape.numpy()), name=tensor.name
                )
        for node in graph:
            for name in ("to", "compute_dtype", "output_dtype"):
                if name in node.attributes and node.attributes[name].as_int() == narrow:
                    node.attributes[name] = ir.AttrInt64(name, wide)
        return PassResult(model, modified=True)


def element_of(dtype: Dtype) -> ir.DataType:
    """A dtype as ONNX numbers it."""
    return ir.DataType[dtype.element.upper()]


def _converted(tensor: ir.TensorProtocol, to: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(to.numpy()), name=tensor.name)


def rewritten(model: Path, copy: Path, edits: Sequence[InPlacePass]) -> Path:
    """Write `model` to `copy` after some passes, with all its numbers."""
    ir.save(Sequential(*edits)(load_onnx(model)).model, copy, external_data=f"{copy.name}.data")
    return copy


class ShareSpectra(InPlacePass):
    """Layers whose rotations have equal numbers read them from the first of them, and runtimes compute them once."""

    def call(self, model: ir.Model) -> PassResult:
        first: dict[tuple[int, bytes], ir.Value] = {}
        for node in model.graph:
            if node.domain == contract.DOMAIN:
                for port in NUMBERS:
                    value = node.inputs[port]
                    assert value is not None and value.const_value is not None
                    key = port, value.const_value.tobytes()
                    node.replace_input_with(port, first.setdefault(key, value))
        return PassResult(model, modified=drop_unused(model.graph))


class NameNodes(InPlacePass):
    """Call nodes and values after the module they came from (layers.0.attention.rotary/FopeRotary)."""

    def call(self, model: ir.Model) -> PassResult:
        kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
        seen: Counter[str] = Counter()
        names = [f"{_module(node)}/{node.op_type}".lstrip("/") for node in model.graph]
        for node, name in zip(model.graph, names, strict=True):
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
            for i, value in enumerate(node.outputs):
                if id(value) not in kept:
                    value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{i}"
        unnamed = [value for name, value in model.graph.initializers.items() if "." not in name]
        for i, value in enumerate(unnamed):
            value.name = f"constant.{i}"
        return PassResult(model, modified=True)


def _module(node: ir.Node) -> str:
    """The path of the torch module that made `node`, empty for the outermost.

    A node that the optimizer made has none; it belongs to the innermost module that holds all its readers.
    """
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    if scopes:
        return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
    readers = [_module(user).replace(".", "/") for value in node.outputs for user, _ in value.uses()]
    return os.path.commonpath(readers).replace("/", ".") if readers else ""


class NameDimensions(InPlacePass):
    """Give torch's symbols (s17, s59 + s70) the names of the contract, everywhere; forget those that have none."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names

    def call(self, model: ir.Model) -> PassResult:
        outputs = (value for node in model.graph for value in node.outputs)
        for value in (*model.graph.inputs, *outputs):
            if value.shape is not None:
                value.shape = ir.Shape([self._name(dim) for dim in value.shape])
        return PassResult(model, modified=True)

    def _name(self, dim: int | ir.SymbolicDim) -> int | str | None:
        return dim if isinstance(dim, int) else self.names.get(str(dim.value))

    def ensures(self, model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.shape is None or any(isinstance(d, ir.SymbolicDim) and d.value is None for d in value.shape):
                raise PostconditionError(f"{value.name} has shape {value.shape}: torch derived a size that is no name")
