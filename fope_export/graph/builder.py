"""What passes write and read graphs with: nodes named by where they belong, constants made once, neighbours by kind."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PreconditionError

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators, version 1 of which is imported with the first of them."""


class GraphBuilder:
    """Adds nodes and constants to a model's graph. Nodes are called `scope/Kind` or `scope/Kind.name`, values like the
    nodes that make them.

    A node or constant that is there already is given, not made again. Raises ValueError where another has its name.
    """

    def __init__(self, model: ir.Model, scope: str = "", *, before: ir.Node | None = None) -> None:
        """New nodes come `before` a node, or last."""
        self.model, self.graph, self.scope, self.before = model, model.graph, scope, before
        self._nodes = {node.name: node for node in model.graph}

    def within(self, scope: str, *, before: ir.Node | None = None) -> "GraphBuilder":
        """The same for another scope and place."""
        made = copy(self)
        made.scope, made.before = scope, before
        return made

    def op(self, kind: str, *inputs: ir.Value | None, name: str = "", **attributes: Any) -> ir.Value:
        """The output of a node that has one."""
        return self.ops(kind, *inputs, name=name, outputs=1, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, name: str = "", domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """All outputs of a node."""
        path = f"{self.scope}/{kind}" + (f".{name}" if name else "")
        if (known := self._nodes.get(path)) is not None and known.graph is self.graph:
            if not _same(known, kind, inputs, attributes):
                raise ValueError(f"{path} is the name of two nodes")
            return known.outputs
        node = self._nodes[path] = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=path)
        for i, value in enumerate(node.outputs):
            value.name = path if outputs == 1 else f"{path}.{i}"
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, [node])
        return node.outputs

    def remove(self, *nodes: ir.Node) -> None:
        """Take out nodes, and those that only they read. Raises ValueError where something else reads them."""
        made = {value.producer() for node in nodes for value in node.inputs if value is not None}
        self.graph.remove(nodes, safe=True)
        if idle := [node for node in made - set(nodes) if node is not None and not self._is_read(node)]:
            self.remove(*idle)

    def _is_read(self, node: ir.Node) -> bool:
        return any(value.uses() or value in self.graph.outputs for value in node.outputs)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A named array."""
        if (known := self.graph.initializers.get(name)) is None:
            return self.initializer(ir.Tensor(array, name=name))
        assert known.const_value is not None
        if not np.array_equal(known.const_value.numpy(), array):
            raise ValueError(f"{name} is the name of two constants")
        return known

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A named tensor, whose numbers may be read later."""
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def integers(self, *numbers: int) -> ir.Value:
        """A vector of int64."""
        return self.constant(f"numbers.{'_'.join(map(str, numbers))}", np.array(numbers, np.int64))

    def integer(self, number: int) -> ir.Value:
        """A scalar of int64."""
        return self.constant(f"number.{number}", np.array(number, np.int64))


def _same(node: ir.Node, kind: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any]) -> bool:
    known = {name: attribute.value for name, attribute in node.attributes.items()}
    return node.op_type == kind and tuple(node.inputs) == inputs and known == attributes


def reader(value: ir.Value, op_type: str) -> ir.Node:
    """The one node of its kind that reads `value`. Raises PreconditionError where it is none or several."""
    readers = [node for node, _ in value.uses() if node.op_type == op_type]
    if len(readers) != 1:
        raise PreconditionError(f"{value.name} is read by {len(readers)} {op_type} nodes, expected one")
    return readers[0]


def maker(value: ir.Value | None, *op_types: str) -> ir.Node:
    """The node of one of these kinds that makes `value`. Raises PreconditionError where there is none."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in op_types:
        raise PreconditionError(f"{value.name if value else 'nothing'} is not made by {' or '.join(op_types)}")
    return node


def source(value: ir.Value | None, *op_types: str) -> ir.Value:
    """What the node of one of these kinds that makes `value` reads first. Raises PreconditionError as `maker` does."""
    first = maker(value, *op_types).inputs[0]
    if first is None:
        raise PreconditionError(f"{value.name if value else 'nothing'} is made from nothing")
    return first
