"""The edits that make a portable file of what torch translated, and a copy in a wider dtype of a finished one."""

import ast
import os.path
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassError, PassResult, PostconditionError, PreconditionError, Sequential

from fope_export.config import ExportConfig
from fope_export.dtypes import DTYPES, Dtype
from fope_export.errors import BundleError, cut
from fope_export.fope import contract
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.reading import load_onnx
from fope_export.graph.streaming import Streamed
from fope_export.graph.translation import function
from fope_export.graph.ways import way_of
from fope_export.onnx_files import AGAIN

POSITIONS, *NUMBERS, AXIS = range(2, len(contract.INPUTS[contract.GENERAL]))
"""The ports of a FopeRotary call: positions, the spectrum's numbers, and in the general version the axis."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch.onnx leaves the path of the module that a node came from."""


class TransposeWeights(Pass):
    """Store each linear layer's weight as its MatMul reads it, under the name `<weight>.T`.

    The transposed copy is made when the file is written, one weight at a time.
    """

    def requires(self, model: ir.Model) -> None:
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                raise PreconditionError(f"{name} has no numbers")

    def call(self, model: ir.Model) -> PassResult:
        graph, builder, transposes = model.graph, GraphBuilder(model), list(_transposes(model.graph))
        for node, tensor in transposes:
            name = f"{tensor.name}.T"
            known = graph.initializers.get(name)
            weight = known if known is not None else builder.initializer(transposed(tensor, name))
            node.outputs[0].replace_all_uses_with(weight)
            graph.remove(node, safe=True)
        drop_unused(graph)
        return PassResult(model, modified=bool(transposes))

    def ensures(self, model: ir.Model) -> None:
        if left := [tensor.name for _, tensor in _transposes(model.graph)]:
            raise PostconditionError(f"{left[0]} is still transposed in the graph")


def _transposes(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    """Nodes that transpose a matrix of weights, with the matrix."""
    for node in graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        tensor = weight.const_value if weight is not None and weight.is_initializer() else None
        if tensor is not None and tuple(node.attributes["perm"].as_ints()) == (1, 0):
            yield node, tensor


def transposed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A matrix whose numbers are turned when they are written."""
    if isinstance(tensor, Streamed):
        return tensor.transposed(name)
    rows, columns = tensor.shape.numpy()

    def read() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape((columns, rows)), name=name)


def drop_unused(graph: ir.Graph) -> bool:
    """Remove initializers that nothing reads; whether there were any."""
    unused = [name for name, value in graph.initializers.items() if not value.uses()]
    for name in unused:
        graph.initializers.pop(name)
    return bool(unused)


class AttachRotary(Pass):
    """Give the model the function that its FopeRotary calls name; every call can reach a plugin. Where one needs the
    general version, all are of that.
    """

    def requires(self, model: ir.Model) -> None:
        calls = list(_rotations(model.graph))
        if not calls:
            raise PreconditionError(f"the model makes no call of {contract.DOMAIN}::{contract.NAME}")
        for node in calls:
            wanted = contract.DISPATCH[contract.PLAIN]
            carried = {key: node.attributes[key].as_string() for key in wanted if key in node.attributes}
            if carried not in contract.DISPATCH.values():
                raise PreconditionError(f"{node.name} carries {carried}, not {wanted}: no plugin would be found")

    def call(self, model: ir.Model) -> PassResult:
        calls = list(_rotations(model.graph))
        version = contract.GENERAL if any(map(_is_general, calls)) else contract.PLAIN
        if version == contract.GENERAL:
            builder = GraphBuilder(model)
            for node in calls:
                _generalize(builder, node)
        body = function(model.opset_imports[""], version)
        model.functions[body.identifier()] = body
        model.opset_imports[contract.DOMAIN] = version
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for node in _rotations(model.graph):
            if len(node.inputs) != len(contract.INPUTS[model.opset_imports[contract.DOMAIN]]):
                raise PostconditionError(f"{node.name} has {len(node.inputs)} inputs")
            if node.op_identifier() not in model.functions or node.domain not in model.opset_imports:
                raise PostconditionError(f"{node.name} calls a function that the model lacks")


def _rotations(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.domain == contract.DOMAIN)


def _is_general(node: ir.Node) -> bool:
    """Whether only the general version computes what the call asks for."""
    positions, freq, coef = (node.inputs[port] for port in (POSITIONS, *NUMBERS[:2]))
    assert positions and freq and freq.shape and coef and coef.shape
    return len(node.inputs) > AXIS or positions.dtype == ir.DataType.FLOAT or coef.shape[1] != freq.shape[0]


def _generalize(builder: GraphBuilder, node: ir.Node) -> None:
    """Have a call take positions [A, B, S] and an axis for each frequency, as the general version does."""
    for name, value in contract.DISPATCH[contract.GENERAL].items():
        node.attributes[name] = ir.AttrString(name, value)
    if len(node.inputs) > AXIS:
        return
    positions, freq = node.inputs[POSITIONS], node.inputs[NUMBERS[0]]
    assert positions is not None and freq is not None and freq.shape is not None
    node.resize_inputs(AXIS + 1)
    builder = builder.within(f"{positions.name}", before=node)
    node.replace_input_with(POSITIONS, builder.op("Unsqueeze", positions, builder.integers(0)))
    zeros = np.zeros(freq.shape.numpy(), np.int64)
    node.replace_input_with(AXIS, builder.constant(f"numbers.axis.{len(zeros)}", zeros))


class CastBFloat16ToFloat32(Pass):
    """Every value of one dtype gets another, in the main graph; FopeRotary's body follows its attribute. Weights stay
    as they are stored, and what reads them reads a Cast of them, which runtimes compute once, when they load it.
    """

    def __init__(self, narrow: Dtype, wide: Dtype) -> None:
        super().__init__()
        self._narrow, self._from, self._to = narrow.precision, element_of(narrow), element_of(wide)

    def requires(self, model: ir.Model) -> None:
        if not any(_computed_in(model.graph, self._from)):
            raise PreconditionError(f"the model has nothing in {self._narrow}")

    def call(self, model: ir.Model) -> PassResult:
        for value in _values(model.graph):
            if value.dtype == self._from:
                value.dtype = self._to
        for node, name in _dtypes(model.graph):
            if node.attributes[name].as_int() == self._from:
                node.attributes[name] = ir.AttrInt64(name, self._to)
        builder, first = GraphBuilder(model), model.graph.node(0)
        for weight in list(_weights(model.graph, self._from)):
            self._cast(weight, builder.within(f"{weight.name}", before=first))
        return PassResult(model, modified=True)

    def _cast(self, weight: ir.Value, builder: GraphBuilder) -> None:
        readers = tuple(weight.uses())
        wide = builder.op("Cast", weight, to=int(self._to))
        wide.shape, wide.type = weight.shape, ir.TensorType(self._to)
        for node, port in readers:
            node.replace_input_with(port, wide)

    def ensures(self, model: ir.Model) -> None:
        if left := next(_computed_in(model.graph, self._from), None):
            raise PostconditionError(f"{left} is in {self._narrow}")


def _computed_in(graph: ir.Graph, dtype: ir.DataType) -> Iterator[str | None]:
    """Names of what is computed in a dtype: values, weights that are read as they are, and nodes that make them so."""
    yield from (value.name for value in _values(graph) if value.dtype == dtype)
    for weight in _weights(graph, dtype):
        yield from (weight.name for node, _ in weight.uses() if node.op_type != "Cast")
    for node, name in _dtypes(graph):
        if node.attributes[name].as_int() == dtype:
            yield node.name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from (value for node in graph for value in node.outputs)


def _weights(graph: ir.Graph, dtype: ir.DataType) -> Iterator[ir.Value]:
    return (value for value in graph.initializers.values() if value.const_value and value.const_value.dtype == dtype)


def _dtypes(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    """Nodes with the attributes of theirs that are an element type."""
    names = ("to", "compute_dtype", "output_dtype")
    return ((node, name) for node in graph for name in names if name in node.attributes)


def element_of(dtype: Dtype) -> ir.DataType:
    """A dtype as ONNX numbers it."""
    return ir.DataType[dtype.element.upper()]


def rewritten(model: Path, copy: Path, edits: Sequence[Pass]) -> Path:
    """Write `model` to `copy` after some passes: with all its numbers, or beside it, where they share them.

    Raises BundleError where the model is not what they need.
    """
    try:
        edited = Sequential(*edits)(load_onnx(model)).model
    except PassError as cause:
        raise BundleError(f"{model} is not as its manifest says: {cut(cause.__cause__)}", hint=AGAIN) from cause
    ir.save(edited, copy, external_data=None if copy.parent == model.parent else f"{copy.name}.data")
    return copy


def widening(export: ExportConfig) -> list[Pass]:
    """What makes a file that was exported so run where its numbers are not known; nothing where every runtime knows
    them.
    """
    dtype, row = DTYPES[export.dtype], export.quantization
    plain = way_of(row).plain() if row else []
    return [*plain, CastBFloat16ToFloat32(dtype, dtype.widened)] if dtype.widened else plain


class ShareSpectra(Pass):
    """Layers whose rotations have equal numbers read them from the first of them, and runtimes compute them once."""

    def requires(self, model: ir.Model) -> None:
        for node in _rotations(model.graph):
            for value in node.inputs[NUMBERS[0] :]:
                if value is None or value.const_value is None:
                    raise PreconditionError(f"{node.name} reads numbers that are no initializers")

    def call(self, model: ir.Model) -> PassResult:
        first: dict[tuple[int, bytes], ir.Value] = {}
        for node, port, value, numbers in _spectra(model.graph):
            node.replace_input_with(port, first.setdefault((port, numbers), value))
        return PassResult(model, modified=drop_unused(model.graph))

    def ensures(self, model: ir.Model) -> None:
        first: dict[tuple[int, bytes], ir.Value] = {}
        for node, port, value, numbers in _spectra(model.graph):
            if first.setdefault((port, numbers), value) is not value:
                raise PostconditionError(f"{node.name} reads a copy of another layer's numbers")


def _spectra(graph: ir.Graph) -> Iterator[tuple[ir.Node, int, ir.Value, bytes]]:
    """What every rotation reads at each port after its positions: the value, and its bytes."""
    for node, port in ((call, port) for call in _rotations(graph) for port in range(NUMBERS[0], len(call.inputs))):
        value = node.inputs[port]
        assert value is not None and value.const_value is not None
        yield node, port, value, value.const_value.tobytes()


class NameNodes(Pass):
    """Call nodes and values after the module they came from (layers.0.attention.rotary/FopeRotary)."""

    def requires(self, model: ir.Model) -> None:
        if not any(SCOPES in node.metadata_props for node in model.graph):
            raise PreconditionError(f"no node has {SCOPES}: torch.onnx did not make the model")

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

    def ensures(self, model: ir.Model) -> None:
        names = [f"{_module(node)}/{node.op_type}".lstrip("/") for node in model.graph]
        for node, name in zip(model.graph, names, strict=True):
            if not (node.name or "").startswith(name):
                raise PostconditionError(f"{node.name} is not called {name}")
        if again := [name for name, count in Counter(node.name for node in model.graph).items() if count > 1]:
            raise PostconditionError(f"{again[0]} is the name of two nodes")


def _module(node: ir.Node) -> str:
    """The path of the torch module that made `node`, empty for the outermost.

    A node that the optimizer made has none; it belongs to the innermost module that holds all its readers.
    """
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    if scopes:
        return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
    readers = [_module(user).replace(".", "/") for value in node.outputs for user, _ in value.uses()]
    return os.path.commonpath(readers).replace("/", ".") if readers else ""


class NameDimensions(Pass):
    """Give torch's symbols (s17, s59 + s70) the names of the contract, everywhere; forget those that have none."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names

    def requires(self, model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.shape is None:
                raise PreconditionError(f"{value.name} has no shape")

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
            if any(
                isinstance(dim, ir.SymbolicDim) and dim.value not in self.names.values() for dim in value.shape or ()
            ):
                raise PostconditionError(f"{value.name} has shape {value.shape}: torch derived a size that is no name")
