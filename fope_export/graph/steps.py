"""What a step of a decoder feeds, as values in its graph. B batch, S new tokens."""

from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes import PreconditionError

from fope_export.graph.builder import GraphBuilder

SCOPE = "steps"


class Steps(NamedTuple):
    """Sizes come from shapes and counts from the mask, and never meet: on a GPU the ones are the host's, the others are
    not. Sizes come from Shape alone: the host waits for what any other operator of the GPU says, which no CUDA graph
    can record.

    New tokens that are padding are written too, after the real ones: those that come next overwrite them.
    """

    rows: ir.Value  # [1], B
    new: ir.Value  # [1], S
    tokens: ir.Value  # [], B * S
    fed: ir.Value  # [B, S], the new tokens' mask
    counts: ir.Value  # [B, 1], how many of them are real
    seqlens_k: ir.Value  # [B], int32, the last that each row writes
    total_sequence_length: ir.Value  # [1], int32, the mask's length


def steps(model: ir.Model) -> Steps:
    """Made by the first pass that asks, for all. Raises PreconditionError as `decoder_inputs` does."""
    builder, inputs = GraphBuilder(model, SCOPE), decoder_inputs(model)
    ids, mask, one = inputs["input_ids"], inputs["attention_mask"], builder.integers(1)
    rows = builder.op("Shape", ids, start=0, end=1)
    new = builder.op("Shape", ids, name="new", start=1, end=2)
    tokens = builder.op("Squeeze", builder.op("Mul", rows, new, name="tokens"), name="tokens")
    total = builder.op("Shape", mask, name="total", start=1, end=2)
    fed = builder.op("Slice", mask, builder.op("Neg", new), total, one)
    counts = builder.op("ReduceSum", fed, one, name="fed")
    behind = builder.op("ReduceSum", builder.op("Sub", builder.integer(1), fed), one, name="padding")
    last = builder.op("Sub", builder.op("ReduceSum", mask, one), builder.integer(1), name="last")
    flat = builder.op("Reshape", builder.op("Add", last, behind), builder.integers(-1))
    seqlens_k = builder.op("Cast", flat, to=int(ir.DataType.INT32))
    total_sequence_length = builder.op("Cast", total, name="total", to=int(ir.DataType.INT32))
    return Steps(rows, new, tokens, fed, counts, seqlens_k, total_sequence_length)


def decoder_inputs(model: ir.Model) -> dict[str, ir.Value]:
    """A decoder's inputs by name. Raises PreconditionError where one is missing."""
    inputs = {value.name: value for value in model.graph.inputs if value.name}
    if missing := {"input_ids", "attention_mask", "position_ids"} - inputs.keys():
        raise PreconditionError(f"the model has no input {min(missing)}")
    return inputs
