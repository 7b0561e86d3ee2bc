"""A decoder in the operators that ONNX Runtime runs fastest: attention with its cache, sums with their norms, and
logits of the last tokens alone.

B batch, S new tokens, H query heads, K key-value heads, E head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.graph.base import Pass
from fope_export.graph.builder import MICROSOFT, GraphBuilder, maker, reader, source
from fope_export.graph.quantize import OPERATOR
from fope_export.graph.steps import SCOPE, Steps, decoder_inputs, steps
from fope_export.manifest import KEPT

CAPACITY = "capacity"
"""A cache's room for tokens."""
NOWHERE = 1 << 40
"""An index that no axis has."""
ATTENTION, NORM, SUM_AND_NORM = "GroupQueryAttention", "RMSNormalization", "SkipSimplifiedLayerNormalization"


@dataclass(frozen=True)
class Attention:
    """An attention with a growing cache, as `ShareSeries` leaves it."""

    node: ir.Node
    packed: ir.Value  # [B, S, (H + 2 * K) * E], q, k and v, which are split and transposed
    heads: int
    kv_heads: int
    caches: tuple[ir.Node, ir.Node]  # Concat of past and new; keys, then values
    out: ir.Node  # Reshape to [B, S, H * E], what attention's projection reads

    @classmethod
    def around(cls, node: ir.Node) -> "Attention":
        """Raises PreconditionError where the graph is another."""
        caches = maker(node.inputs[1], "Concat"), maker(node.inputs[2], "Concat")
        made = [node.inputs[0], *(cache.inputs[1] for cache in caches)]
        split = maker(source(made[0], "Transpose"), "Split")
        if [source(value, "Transpose") for value in made] != list(split.outputs):
            raise PreconditionError(f"{node.name} does not read one tensor of queries, keys and values")
        out = reader(reader(node.outputs[0], "Transpose").outputs[0], "Reshape")
        heads, kv_heads, _ = _sizes(split)
        return cls(node, source(split.inputs[0], "Reshape"), heads, kv_heads, caches, out)

    @property
    def path(self) -> str:
        return (self.node.name or "").rpartition("/")[0]


def _sizes(split: ir.Node) -> list[int]:
    value = split.inputs[1]
    if value is None or value.const_value is None:
        raise PreconditionError(f"{split.name} has no sizes")
    return [int(size) for size in value.const_value.numpy()]


def attentions(graph: ir.Graph) -> list[Attention]:
    """All of a decoder's. Raises PreconditionError where there is none, or its cache is not the graph's."""
    layers = [Attention.around(node) for node in graph if node.op_type == "Attention"]
    if not layers:
        raise PreconditionError("the model has no attention")
    for cache in (cache for each in layers for cache in each.caches):
        if cache.inputs[0] not in graph.inputs or cache.outputs[0] not in graph.outputs:
            raise PreconditionError(f"{cache.name} does not join an input of the model to an output")
    return layers


class FuseAttention(Pass):
    """Attention and cache are one operator that writes new keys and values in place (GroupQueryAttention).

    A cache may be longer than the tokens in it: past and present are then the same memory. Rows of different lengths
    are padded on the right.
    """

    def requires(self, model: ir.Model) -> None:
        decoder_inputs(model)
        attentions(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        step, builder = steps(model), GraphBuilder(model)
        for layer in attentions(model.graph):
            _fuse(builder.within(layer.path), layer, step)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if left := [node.name for node in model.graph if node.op_type == "Attention"]:
            raise PostconditionError(f"{left[0]} is left")
        for node in (node for node in model.graph if node.op_type == ATTENTION):
            for past, present in zip(node.inputs[3:5], node.outputs[1:], strict=True):
                given = past is not None and past in model.graph.inputs and past.shape == present.shape
                if not given or present not in model.graph.outputs:
                    raise PostconditionError(f"{node.name} does not write into its cache")


def _fuse(builder: GraphBuilder, layer: Attention, step: Steps) -> None:
    known, graph = layer.node.attributes, builder.graph
    scale = {"scale": known["scale"].value} if "scale" in known else {}
    pasts = [cache.inputs[0] for cache in layer.caches]
    out, *presents = builder.ops(
        ATTENTION, layer.packed, None, None, *pasts, step.seqlens_k, step.total_sequence_length,
        outputs=3, domain=MICROSOFT, num_heads=layer.heads, kv_num_heads=layer.kv_heads, **scale,
    )  # fmt: skip
    layer.out.outputs[0].replace_all_uses_with(out)
    for past, new, cache in zip(pasts, presents, layer.caches, strict=True):
        old = cache.outputs[0]
        assert past is not None and past.shape is not None
        past.shape = ir.Shape([*past.shape[:2], CAPACITY, past.shape[3]])
        new.name, new.shape, new.type = old.name, past.shape, old.type
        graph.outputs[graph.outputs.index(old)] = new
    builder.remove(layer.out, maker(layer.out.inputs[0], "Transpose"), layer.node, *layer.caches)


class KeepLastLogits(Pass):
    """Final norm and output projection see only some of the new tokens: those that are `logits_to_keep`, a new input,
    from each row's end, -1 being its last.

    A prompt that is padded anywhere but on the right makes the run fail.
    """

    def requires(self, model: ir.Model) -> None:
        decoder_inputs(model)
        if any(value.name == KEPT for value in model.graph.inputs):
            raise PreconditionError(f"the model has the input {KEPT} already")
        _last_norm(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        """Where the new tokens are no ones followed by zeros in the mask, the last 1 is elsewhere than their number
        says: the gather is then sent nowhere, and ONNX Runtime ends the run.
        """
        graph, builder, step = model.graph, GraphBuilder(model, SCOPE), steps(model)
        kept = ir.Value(name=KEPT, shape=ir.Shape(["kept"]), type=ir.TensorType(ir.DataType.INT64))
        kept.const_value = ir.Tensor(np.array([-1]), name=KEPT)
        graph.inputs.append(kept)
        graph.register_initializer(kept)
        zero, one = builder.integer(0), builder.integer(1)
        new = builder.op("Squeeze", step.new)
        after = builder.op("Add", new, one, name="one")
        places = builder.op("Mul", step.fed, builder.op("Range", one, after, one))
        whole = builder.op("Equal", builder.op("ReduceMax", places, builder.integers(1)), step.counts)
        index = builder.op("Clip", builder.op("Add", step.counts, kept, name="index"), zero)  # [B, kept]
        starts = builder.op("Unsqueeze", builder.op("Range", zero, step.tokens, new, name="rows"), builder.integers(1))
        index = builder.op("Where", whole, builder.op("Add", starts, index, name="row"), builder.integer(NOWHERE))
        norm, logits = _last_norm(graph), graph.outputs[0]
        assert logits.shape is not None and norm.inputs[1] is not None and norm.inputs[1].shape is not None
        flat = builder.op("Reshape", norm.inputs[0], builder.integers(-1, *norm.inputs[1].shape), name="tokens")
        picked = builder.within("padding_belongs_on_the_right").op("Gather", flat, index)
        norm.replace_input_with(0, picked)
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])  # as by default, which GenAI goes by
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        seen = _last_norm(model.graph).inputs[0]
        gather = seen.producer() if seen is not None else None
        if gather is None or gather.op_type != "Gather":
            raise PostconditionError("the last norm sees all tokens")


def _last_norm(graph: ir.Graph) -> ir.Node:
    """Whose output the logits are a product of. Raises PreconditionError where there is none."""
    return maker(source(graph.outputs[0], "MatMul", OPERATOR), NORM)


class FuseSkipNorm(Pass):
    """A residual sum and the norm that reads it are one operator."""

    def requires(self, model: ir.Model) -> None:
        for node in _sums(model.graph):
            if node.attributes["axis"].value != -1:
                raise PreconditionError(f"{node.name} is of more than the last axis")

    def call(self, model: ir.Model) -> PassResult:
        builder, norms = GraphBuilder(model), list(_sums(model.graph))
        for norm in norms:
            total, weight = norm.inputs
            add = maker(total, "Add")
            normed, *_, new = builder.within((norm.name or "").rpartition("/")[0], before=norm).ops(
                SUM_AND_NORM, *add.inputs, weight, outputs=4, domain=MICROSOFT,
                epsilon=norm.attributes["epsilon"].value,
            )  # fmt: skip
            norm.outputs[0].replace_all_uses_with(normed)
            add.outputs[0].replace_all_uses_with(new)
            builder.remove(norm, add)
        return PassResult(model, modified=bool(norms))

    def ensures(self, model: ir.Model) -> None:
        if left := [norm.name for norm in _sums(model.graph)]:
            raise PostconditionError(f"{left[0]} reads a sum")


def _sums(graph: ir.Graph) -> Iterator[ir.Node]:
    """Norms of a sum of two values, neither of them a weight."""
    for norm in graph:
        total = norm.inputs[0] if norm.op_type == NORM else None
        add = total.producer() if total is not None else None
        if add is not None and add.op_type == "Add" and not any(x is None or x.is_initializer() for x in add.inputs):
            yield norm
