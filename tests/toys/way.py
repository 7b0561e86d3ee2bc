"""Weights as int8 with a step for each output, in standard operators."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fope_export.graph.calibration import Ranges
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Quantised, array_of, initializer, linear_weight
from tests.toys import TOY


class RoundWeights(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        for node in list(model.graph):
            if (weight := linear_weight(node)) is not None:
                self._round(node, weight, model.graph)
        return PassResult(model, modified=True)

    def _round(self, node: ir.Node, weight: ir.Value, graph: ir.Graph) -> None:
        assert weight.name is not None
        name, numbers = weight.name.removesuffix(".T"), array_of(weight)
        steps = (np.abs(numbers).max(0) / 127).astype(np.float32)
        arrays = {TOY.numbers: np.rint(numbers / steps).astype(np.int8), "scale": steps}
        inputs = [initializer(ir.Tensor(array, name=f"{name}.{part}")) for part, array in arrays.items()]
        for value in inputs:
            graph.register_initializer(value)
        back = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{node.name}.weight")
        back.outputs[0].name = back.name
        graph.insert_before(node, [back])
        node.replace_input_with(1, back.outputs[0])
        graph.initializers.pop(weight.name)


def write(kind: str, ranges: Mapping[str, Ranges]) -> RoundWeights:
    assert kind == TOY.name and not ranges
    return RoundWeights()


def read(path: Path) -> Iterator[Quantised]:
    for node in load_onnx(path).graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        back = weight.producer() if weight is not None else None
        if back is not None and back.op_type == "DequantizeLinear":
            small, steps = (array_of(value).astype(np.float64) for value in back.inputs)
            allowed = np.broadcast_to(0.51 * steps, small.shape)
            yield Quantised((node.name or "").rpartition("/")[0], (small * steps).T, allowed.T)


def exact() -> list[InPlacePass]:
    return []


def fast() -> list[InPlacePass]:
    return []
