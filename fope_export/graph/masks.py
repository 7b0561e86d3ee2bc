"""Attention's masks in the shape that every runtime takes."""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder

MASK = 3
"""Attention's input."""


class ExpandMasks(Pass):
    """Give each query a row of its mask where one row [..., 1, T] is for all of them: ONNX lets that spread, and ONNX
    Runtime's Attention refuses it.
    """

    def requires(self, model: ir.Model) -> None:
        for node, mask in _spread(model):
            query = node.inputs[0]
            if query is None or query.shape is None or query.shape.rank() != 4:
                raise PreconditionError(f"{node.name} has the mask {mask.name}, and no queries [B, heads, S, E]")

    def call(self, model: ir.Model) -> PassResult:
        found = list(_spread(model))
        for node, mask in found:
            assert mask.shape is not None
            builder = GraphBuilder(model).within(node.name or "", before=node)
            queries = builder.op("Shape", node.inputs[0], name="queries", start=2, end=3)
            ones = [builder.integers(1)]
            shape = builder.op("Concat", *ones * (mask.shape.rank() - 2), queries, *ones, name="mask", axis=0)
            node.replace_input_with(MASK, whole := builder.op("Expand", mask, shape, name="mask"))
            whole.shape = ir.Shape([*mask.shape[:-2], None, mask.shape[-1]])
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if left := next(_spread(model), None):
            raise PostconditionError(f"{left[0].name} has one row of its mask for all queries")


def _spread(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Attentions with one row of a mask for all queries, and that mask."""
    for node in model.graph:
        mask = node.inputs[MASK] if node.op_type == "Attention" and len(node.inputs) > MASK else None
        if mask is not None and mask.shape is not None and mask.shape.rank() >= 2 and mask.shape[-2] == 1:
            yield node, mask
