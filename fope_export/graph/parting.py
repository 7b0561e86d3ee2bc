"""Linear layers as OpenVINO wants them: none is split after it was computed, and weights lie by result."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.passes import drop_unused, transposed
from fope_export.graph.quantize import OPERATOR

RESULTS = {"MatMul": -1, OPERATOR: 0}
"""By the operator: along which axis of its constants the results lie."""
BETWEEN = ("Add", "Reshape")
"""What may lie between a product and its parts: a bias, and heads told apart."""


class PartProducts(Pass):
    """A product by constants whose results are split becomes a product for each part."""

    def requires(self, model: ir.Model) -> None:
        for layer in _split(model.graph):
            if any(value is None or value.const_value is None for value in layer.constants()):
                raise PreconditionError(f"{layer.product.name} reads weights that are no initializers")

    def call(self, model: ir.Model) -> PassResult:
        found = list(_split(model.graph))
        for layer in found:
            for number in range(len(layer.parts)):
                _make_part(model, layer, number)
            GraphBuilder(model).remove(layer.split)
        drop_unused(model.graph)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if left := next(_split(model.graph), None):
            raise PostconditionError(f"{left.product.name} is split after it was computed")


class Parted(NamedTuple):
    """A product, what lies between, and the Split that alone reads its results."""

    product: ir.Node
    between: list[ir.Node]
    split: ir.Node
    parts: list[list[int]]  # for each its results, or its heads and their channels

    @property
    def widths(self) -> list[int]:
        return [prod(part) for part in self.parts]

    def constants(self) -> Iterator[ir.Value | None]:
        yield from self.product.inputs[1:]
        yield from (node.inputs[1] for node in self.between if node.op_type == "Add")


def _split(graph: ir.Graph) -> Iterator[Parted]:
    for split in graph:
        if split.op_type != "Split":
            continue
        value, between = split.inputs[0], list[ir.Node]()
        while (node := _alone(value)) is not None and node.op_type in BETWEEN:
            between.insert(0, node)
            value = node.inputs[0]
        if node is None or node.op_type not in RESULTS or value is None or value.shape is None:
            continue
        axis = value.shape.rank() - 1
        extents = [part.shape[axis:] if part.shape is not None else () for part in split.outputs]
        layer = Parted(node, between, split, [[size for size in each if isinstance(size, int)] for each in extents])
        if sum(layer.widths) == value.shape[axis] and split.attributes.get_int("axis") in (axis, -1):
            yield layer


def _alone(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that is read once."""
    return value.producer() if value is not None and len(value.uses()) == 1 else None


def _make_part(model: ir.Model, layer: Parted, number: int) -> None:
    product, old, name, widths = layer.product, layer.split.outputs[number], str(number), layer.widths
    builder = GraphBuilder(model).within(product.name or "", before=product)
    attributes = {key: attribute.value for key, attribute in product.attributes.items()}
    if "N" in attributes:
        attributes["N"] = widths[number]
    axis = RESULTS[product.op_type]
    constants = [_share(builder, value, axis, widths, number) for value in product.inputs[1:]]
    made = builder.op(product.op_type, product.inputs[0], *constants, name=name, domain=product.domain, **attributes)
    for node in layer.between:
        own = builder.within(node.name or "", before=node)
        bias = node.op_type == "Add"
        other = _share(own, node.inputs[1], 0, widths, number) if bias else own.integers(0, 0, *layer.parts[number])
        made = own.op(node.op_type, made, other, name=name)
    made.shape, made.type = old.shape, old.type
    old.replace_all_uses_with(made)


def _share(builder: GraphBuilder, value: ir.Value | None, axis: int, widths: list[int], number: int) -> ir.Value:
    """A part's constants, which are read when the file is written."""
    assert value is not None and value.const_value is not None
    whole, name = value.const_value, f"{value.name}.{number}"
    extents = list(whole.shape.numpy())
    each = extents[axis] // sum(widths)
    start, extents[axis] = each * sum(widths[:number]), each * widths[number]

    def read() -> ir.TensorProtocol:
        share = whole.numpy().swapaxes(0, axis)[start : start + extents[axis]].swapaxes(0, axis)
        return ir.Tensor(np.ascontiguousarray(share), name=name)

    return builder.initializer(ir.LazyTensor(read, dtype=whole.dtype, shape=ir.Shape(extents), name=name))


class StoreByResult(Pass):
    """Weights of linear layers lie as OpenVINO multiplies by them, a row for each result, and are transposed in the
    graph: so it keeps no copy, and where it computes in bfloat16 a feed-forward layer becomes one operator.
    """

    def requires(self, model: ir.Model) -> None:
        if not list(_linear(model.graph)):
            raise PreconditionError("the model has no linear layer")

    def call(self, model: ir.Model) -> PassResult:
        turned = dict[ir.Value, ir.Value]()
        for node, weight in list(_linear(model.graph)):
            assert weight.const_value is not None
            builder = GraphBuilder(model).within(node.name or "", before=node)
            if weight not in turned:
                turned[weight] = builder.initializer(transposed(weight.const_value, f"{weight.name}.T"))
            node.replace_input_with(1, builder.op("Transpose", turned[weight], perm=[1, 0]))
        drop_unused(model.graph)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if left := next(_linear(model.graph), None):
            raise PostconditionError(f"{left[0].name} has a column of weights for each result")


def _linear(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Products by a matrix of constants, and the matrix."""
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer() and weight.shape is not None and weight.shape.rank() == 2:
            yield node, weight
