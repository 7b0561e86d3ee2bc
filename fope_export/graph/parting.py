"""Linear layers as OpenVINO wants them: none is split after it was computed, and weights lie by result."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.passes import drop_unused, transposed
from fope_export.graph.quantize import OPERATOR

RESULTS = {"MatMul": -1, OPERATOR: 0}
"""By the operator: along which axis of its constants the results lie."""


class PartProducts(Pass):
    """A product by constants whose results are split into equal parts becomes a product for each part."""

    def requires(self, model: ir.Model) -> None:
        for product, _ in _split(model.graph):
            if any(value is None or value.const_value is None for value in product.inputs[1:]):
                raise PreconditionError(f"{product.name} reads weights that are no initializers")

    def call(self, model: ir.Model) -> PassResult:
        pairs = list(_split(model.graph))
        for product, split in pairs:
            builder, parts = GraphBuilder(model).within(product.name or "", before=product), len(split.outputs)
            attributes = {name: attribute.value for name, attribute in product.attributes.items()}
            if "N" in attributes:
                attributes["N"] //= parts
            for i, old in enumerate(split.outputs):
                constants = (_part(builder, value, RESULTS[product.op_type], i, parts) for value in product.inputs[1:])
                (made,) = builder.ops(
                    product.op_type, product.inputs[0], *constants, outputs=1, name=str(i), domain=product.domain,
                    **attributes,
                )  # fmt: skip
                made.shape, made.type = old.shape, old.type
                old.replace_all_uses_with(made)
            builder.remove(split)
        drop_unused(model.graph)
        return PassResult(model, modified=bool(pairs))

    def ensures(self, model: ir.Model) -> None:
        if left := next(_split(model.graph), None):
            raise PostconditionError(f"{left[0].name} is split after it was computed")


def _split(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Products, each with the Split that alone reads its results and makes equal parts of them."""
    for node in graph:
        value = node.inputs[0] if node.op_type == "Split" and "num_outputs" in node.attributes else None
        product = value.producer() if value is not None else None
        if product is None or product.op_type not in RESULTS or value is None or len(value.uses()) > 1:
            continue
        if value.shape is not None and node.attributes["axis"].as_int() in (-1, value.shape.rank() - 1):
            width = value.shape[-1]
            if isinstance(width, int) and width % len(node.outputs) == 0:
                yield product, node


def _part(builder: GraphBuilder, value: ir.Value | None, axis: int, number: int, parts: int) -> ir.Value:
    """A constant's share, which is read when the file is written."""
    assert value is not None and value.const_value is not None
    whole, name = value.const_value, f"{value.name}.{number}"
    extents: list[Any] = list(whole.shape.numpy())
    extents[axis] //= parts

    def read() -> ir.TensorProtocol:
        share = np.split(whole.numpy(), parts, axis=axis)[number]
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
