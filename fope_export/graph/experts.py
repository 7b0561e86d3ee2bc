"""Mixtures of experts at the cost of the chosen ones, in ONNX Runtime's operator MoE.

T tokens, N experts, k of them a token, H hidden and I inner width. Experts' weights are [N, 2 I, H] and [N, H, I].
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.graph.base import Pass
from fope_export.graph.builder import MICROSOFT, GraphBuilder, maker, reader, source
from fope_export.graph.ways import array_of

MIXTURE, DEQUANTIZE = "MoE", "DequantizeLinear"
SWIGLU: dict[str, Any] = {
    "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0,
    "normalize_routing_weights": 0,
}  # fmt: skip
"""What the operator is told: rows of gate and up in turn, gate * sigmoid(gate) * up, and weights as they are."""


@dataclass(frozen=True)
class Mixture:
    """Experts of which all compute every token, as this package writes them."""

    tokens: ir.Value  # [T, H]
    weights: ir.Value  # [T, N], 0 but for the chosen
    chosen: int  # k
    products: tuple[ir.Node, ir.Node]  # with [N, 2 I, H], then with [N, H, I]
    made: ir.Node  # Transpose to [T, H]

    @classmethod
    def around(cls, last: ir.Node) -> "Mixture":
        """Of the second product. Raises PreconditionError where the graph is another."""
        weighted = maker(last.inputs[1], "Mul")
        weights = source(source(weighted.inputs[1], "Unsqueeze"), "Transpose")
        both = maker(weighted.inputs[0], "Mul")
        silu = maker(both.inputs[0], "Mul")
        rows = [maker(value, "Slice") for value in (silu.inputs[0], source(silu.inputs[1], "Sigmoid"), both.inputs[1])]
        first = [(node.inputs[0], *(array_of(value).tolist() for value in node.inputs[1:])) for node in rows]
        if first != [(first[0][0], [start], first[0][2], [1], [2]) for start in (0, 0, 1)]:
            raise PreconditionError(f"{last.name} reads no rows of gate and up in turn")
        product = maker(rows[0].inputs[0], "MatMul")
        total = reader(_cast(last.outputs[0]), "ReduceSum")
        made = reader(_cast(total.outputs[0]), "Transpose")
        return cls(source(product.inputs[1], "Transpose"), weights, _chosen(weights), (product, last), made)

    @property
    def path(self) -> str:
        return (self.made.name or "").rpartition("/")[0]

    @property
    def stored(self) -> tuple[ir.Value, ir.Value]:
        """Its two weights."""
        first, last = (product.inputs[0] for product in self.products)
        assert first is not None and last is not None
        return first, last


def _cast(value: ir.Value) -> ir.Value:
    """What a Cast makes of it, if one reads it: half precision is added in float32."""
    return next((node.outputs[0] for node, _ in value.uses() if node.op_type == "Cast"), value)


def _chosen(weights: ir.Value) -> int:
    """How many experts a token has: of each group, as many as are scattered."""
    node = weights.producer()
    while node is not None and node.op_type in ("Cast", "Div", "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    indices = node.inputs[1] if node is not None and node.op_type == "ScatterElements" else None
    if indices is None or indices.shape is None:
        raise PreconditionError(f"{weights.name} is of experts that nothing chose")
    return prod(size for size in indices.shape[1:] if isinstance(size, int))


def mixtures(graph: ir.Graph) -> list[Mixture]:
    """All that there are. Raises PreconditionError where one is not as this package writes them."""
    return [Mixture.around(node) for node in graph if _is_last(node)]


def _is_last(node: ir.Node) -> bool:
    """Whether it is a product of all experts with what each of them computed."""
    first, second = node.inputs if node.op_type == "MatMul" else (None, None)
    stored = first is not None and (first.is_initializer() or _is_dequantized(first))
    return bool(stored and second is not None and second.shape is not None and len(second.shape) == 3)


def _is_dequantized(value: ir.Value) -> bool:
    node = value.producer()
    return (
        node is not None and node.op_type == DEQUANTIZE and all(each.is_initializer() for each in node.inputs if each)
    )


class FuseExperts(Pass):
    """Only the chosen experts compute a token: one operator (MoE) in the place of all products.

    What chooses them stays, so that ties and groups are the model's own: the operator takes logarithms of weights for
    logits, and finds those that are not 0 again. It divides by their sum, which its output is multiplied by.
    """

    def requires(self, model: ir.Model) -> None:
        mixtures(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        builder, found = GraphBuilder(model), mixtures(model.graph)
        for mixture in found:
            _fuse(builder.within(mixture.path, before=mixture.made), mixture)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if left := [mixture.path for mixture in mixtures(model.graph)]:
            raise PostconditionError(f"all experts of {left[0]} compute every token")


def _fuse(builder: GraphBuilder, mixture: Mixture) -> None:
    proj, out = mixture.stored
    logits = builder.op("Log", mixture.weights, name="weights")
    total = builder.op("ReduceSum", mixture.weights, builder.integers(-1), name="weights")
    mixed = builder.op(
        MIXTURE, mixture.tokens, logits, proj, None, out, domain=MICROSOFT, k=mixture.chosen, **SWIGLU
    )  # fmt: skip
    scaled, old = builder.op("Mul", mixed, total, name="weights"), mixture.made.outputs[0]
    for value in (mixed, scaled):
        value.shape, value.type = old.shape, old.type
    old.replace_all_uses_with(scaled)
    builder.remove(mixture.made)
