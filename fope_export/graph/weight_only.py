"""Linear layers of which the weights alone are rounded, in blocks of their inputs, for TensorRT: numbers of 4 bits that
DequantizeLinear puts out in the activations' dtype, of which its steps are too: TensorRT takes no others.

Embedding, norms, routers, experts, output layer and rotation stay what they are. K inputs, N outputs.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.dtypes import FP32
from fope_export.errors import ExportError
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.ways import like, linear_weight, module_of

DEQUANTIZE = "DequantizeLinear"
SMALLEST = 16
"""Inputs of a block at least; a layer whose inputs are no multiple is left as it is."""
HEAD = "lm_head"
"""The output layer's module."""
Rounding = Callable[[GraphBuilder, str, NDArray[Any], ir.Node], ir.Value]
"""Writes what is to be multiplied in the place of a weight [K, N] of that name, with the builder, for a product."""


class RoundWeights(Pass):
    """Have linear layers read what a way to round makes of `<weight>.T`.

    Weights are read and rounded one at a time, and those that are rounded are in memory until they are written.
    """

    def __init__(self, rounding: Rounding, quantiser: str) -> None:
        """`quantiser` says who rounds."""
        super().__init__()
        self._rounding, self._quantiser = rounding, quantiser

    def requires(self, model: ir.Model) -> None:
        if not any(map(linear_weight, model.graph)):
            raise PreconditionError("the model has no linear layer to quantize")

    def call(self, model: ir.Model) -> PassResult:
        """Raises ExportError where no layer can be rounded, or one does not fit its dtype."""
        builder, layers = GraphBuilder(model), list(_exact(model))
        if not layers:
            raise ExportError(
                f"no linear layer has inputs in blocks of {SMALLEST}",
                hint="Export with another --quantize, or without.",
            )
        for node, weight in layers:
            assert weight.name and weight.const_value is not None
            scope = builder.within(f"{module_of(node)}/weight", before=node)
            back = self._rounding(scope, weight.name.removesuffix(".T"), weight.const_value.numpy(), node)
            node.replace_input_with(1, like(weight, weight.const_value.dtype, back))
            if not weight.uses():
                builder.graph.initializers.pop(weight.name)
        model.metadata_props["fope.quantiser"] = self._quantiser
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if left := next(_exact(model), None):
            raise PostconditionError(f"{left[0].name} is not quantized")


def _exact(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Linear layers that are to be rounded and are not, with their weights."""
    for node in model.graph:
        weight = linear_weight(node) if module_of(node) != HEAD else None
        if weight is not None and weight.const_value and weight.const_value.shape.numpy()[0] % SMALLEST == 0:
            yield node, weight


class Rounded(NamedTuple):
    """A linear layer whose weight is rounded so."""

    module: str
    product: ir.Node
    back: ir.Node
    """The DequantizeLinear that makes the weight."""

    @property
    def block(self) -> int:
        return self.back.attributes["block_size"].as_int()


def rounded(model: ir.Model) -> Iterator[Rounded]:
    """Every such layer, in order of execution."""
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        back = weight.producer() if weight is not None else None
        if back is not None and back.op_type == DEQUANTIZE and "block_size" in back.attributes:
            yield Rounded(module_of(node), node, back)


def dequantize(
    builder: GraphBuilder, name: str, numbers: NDArray[Any], part: str, steps: ir.Value, block: int
) -> ir.Value:
    """Numbers [K, N], stored as `<name>.<part>`, times their blocks' steps [K / block, N]."""
    small = builder.initializer(ir.Tensor(numbers, name=f"{name}.{part}"))
    return builder.op(DEQUANTIZE, small, steps, axis=0, block_size=block)


def largest(weight: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """The largest absolute value in each block: [K / block, N]."""
    found: NDArray[np.float32] = np.abs(weight).reshape(-1, block, weight.shape[1]).max(1)
    return found


def least(dtype: np.dtype[Any]) -> float:
    """The smallest normal number: steps are no smaller, and so have all their digits."""
    return torch.finfo(getattr(torch, dtype.name)).tiny


def check_range(name: str, numbers: NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Raises ExportError where `numbers`, the largest that a rounded weight has, do not fit its dtype."""
    with np.errstate(over="ignore"):
        fits = np.isfinite(numbers.astype(dtype).astype(np.float32)).all()
    if not fits:
        raise ExportError(
            f"{name} in 4 bits reaches {numbers.max():.6g}, which {dtype} does not hold",
            hint=f"Export in {FP32.name}, or without quantize.",
        )
