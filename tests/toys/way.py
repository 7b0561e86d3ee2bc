"""Weights as int8 with a step for each output, in standard operators."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.config import ExportConfig
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Measured, Quantized, array_of, linear_weight
from tests.toys import TOY


class RoundWeights(Pass):
    def requires(self, model: ir.Model) -> None:
        if not any(map(linear_weight, model.graph)):
            raise PreconditionError("the model has no linear layer")

    def call(self, model: ir.Model) -> PassResult:
        builder = GraphBuilder(model)
        for node in list(model.graph):
            if (weight := linear_weight(node)) is not None:
                self._round(builder.within((node.name or "").rpartition("/")[0], before=node), node, weight)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if any(map(linear_weight, model.graph)):
            raise PostconditionError("a linear layer is left")

    def _round(self, builder: GraphBuilder, node: ir.Node, weight: ir.Value) -> None:
        assert weight.name is not None
        name, numbers = weight.name.removesuffix(".T"), array_of(weight)
        steps = (np.abs(numbers).max(0) / 127).astype(np.float32)
        arrays = {TOY.numbers: np.rint(numbers / steps).astype(np.int8), "scale": steps}
        inputs = [builder.constant(f"{name}.{part}", array) for part, array in arrays.items()]
        node.replace_input_with(1, builder.op("DequantizeLinear", *inputs, axis=1))
        builder.graph.initializers.pop(weight.name)


def write(config: ExportConfig, measured: Measured) -> list[Pass]:
    assert config.quantize == TOY.name and measured is None
    return [RoundWeights()]


def read(path: Path) -> Iterator[Quantized]:
    for node in load_onnx(path).graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        back = weight.producer() if weight is not None else None
        if back is not None and back.op_type == "DequantizeLinear":
            small, steps = (array_of(value).astype(np.float64) for value in back.inputs)
            allowed = np.broadcast_to(0.51 * steps, small.shape)
            yield Quantized((node.name or "").rpartition("/")[0], (small * steps).T, allowed.T)


def exact() -> list[Pass]:
    return []


def fast() -> list[Pass]:
    return []


def plain() -> list[Pass]:
    return []
