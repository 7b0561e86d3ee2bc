"""Linear layers with inputs and weights rounded to 8 bits, written as QuantizeLinear and DequantizeLinear.

This is the form that TensorRT fuses into products of 8 bits. Scales are float32 whatever the activations are: float16
would lose digits of the small ones. Embedding, norms, routers, output layer and rotation stay what they are.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from fope_export.errors import require
from fope_export.graph.calibration import Ranges
from fope_export.graph.passes import drop_unused
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Quantised, Rounding, array_of, initializer, linear_weight
from fope_export.quantizations import QUANTIZATIONS

QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"


class Grid(NamedTuple):
    """The numbers that values are rounded to, in steps of a scale."""

    dtype: ir.DataType
    largest: float

    def rounded(self, values: NDArray[Any]) -> NDArray[Any]:
        """To the nearest, ties to even; what is beyond the largest becomes the largest."""
        whole = np.rint(values) if self.dtype == ir.DataType.INT8 else values
        small: NDArray[Any] = whole.clip(-self.largest, self.largest).astype(self.dtype.numpy())
        return small

    def half_a_step(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far rounding may have moved what became `values`, and a little more. E4M3 has 3 bits, down to 2^-9."""
        whole = self.dtype == ir.DataType.INT8
        return 0.51 * (np.ones_like(values) if whole else np.maximum(np.abs(values) / 8, 2**-9))


GRIDS = {grid.dtype.name: grid for grid in (Grid(ir.DataType.INT8, 127.0), Grid(ir.DataType.FLOAT8E4M3FN, 448.0))}
"""By ONNX's name of the numbers."""


class InsertQdq(InPlacePass):
    """Have each calibrated linear layer read rounded inputs, and `<weight>.<numbers>` in place of `<weight>.T`.

    Weights are rounded when the file is written, one at a time.
    """

    def __init__(self, kind: str, ranges: Mapping[str, Ranges]) -> None:
        """Of a row; `ranges` are by the layer's name, as `calibrate` finds them."""
        super().__init__()
        self._row, self._ranges = QUANTIZATIONS[kind], ranges
        self._grid = GRIDS[self._row.element]

    def call(self, model: ir.Model) -> PassResult:
        for node in list(model.graph):
            module = (node.name or "").rpartition("/")[0]
            if (weight := linear_weight(node)) is not None and module in self._ranges:
                self._round_weight(node, module, weight, model.graph)
                self._round_input(node, module, model.graph)
        optimizer = require("modelopt", "modelopt")
        model.metadata_props["fope.quantiser"] = f"nvidia-modelopt {optimizer.__version__}, {self._row.name}"
        return PassResult(model, modified=True)

    def _round_input(self, node: ir.Node, module: str, graph: ir.Graph) -> None:
        x = node.inputs[0]
        assert x is not None and x.dtype is not None
        step = self._scale(f"{module}.input_scale", np.float32(self._ranges[module].inputs), graph)
        small = _node(QUANTISE, [x, step], {"output_dtype": self._grid.dtype}, module, x)
        back = _node(DEQUANTISE, [small.outputs[0], step], {"output_dtype": x.dtype}, module, x)
        graph.insert_before(node, [small, back])
        node.replace_input_with(0, back.outputs[0])

    def _round_weight(self, node: ir.Node, module: str, weight: ir.Value, graph: ir.Graph) -> None:
        """A weight that nothing else reads leaves the graph."""
        assert weight.name and weight.const_value is not None
        name, tensor, ranges = weight.name.removesuffix(".T"), weight.const_value, self._ranges[module]
        steps = self._scale(f"{name}.scale", ranges.weight, graph)
        read = partial(_rounded, tensor, array_of(steps), self._grid)
        shape, numbers = ir.Shape(tensor.shape.numpy()), self._row.numbers
        small = initializer(ir.LazyTensor(read, self._grid.dtype, shape, name=f"{name}.{numbers}"))
        graph.register_initializer(small)
        axis = {"axis": 1} if ranges.weight.ndim else {}
        back = _node(DEQUANTISE, [small, steps], axis | {"output_dtype": tensor.dtype}, f"{module}/weight", small)
        graph.insert_before(node, [back])
        node.replace_input_with(1, back.outputs[0])
        if not weight.uses():
            graph.initializers.pop(weight.name)

    def _scale(self, name: str, largest: NDArray[np.float32] | np.float32, graph: ir.Graph) -> ir.Value:
        """Of numbers from 0 to `largest`; 1 where that is 0 too."""
        steps = np.where(largest > 0, largest / np.float32(self._grid.largest), 1)
        value = initializer(ir.Tensor(np.asarray(steps, np.float32), name=name))
        graph.register_initializer(value)
        return value

    def ensures(self, model: ir.Model) -> None:
        found = {module for module, _ in _layers(model)}
        if not found or found != set(self._ranges):
            raise PostconditionError(f"calibration and graph disagree in {found ^ set(self._ranges) or 'everything'}")


def _node(kind: str, inputs: list[ir.Value], attributes: Mapping[str, int], module: str, like: ir.Value) -> ir.Node:
    """A node named after its module, whose output has the shape of `like`."""
    node = ir.node(kind, inputs, {name: int(number) for name, number in attributes.items()}, name=f"{module}/{kind}")
    dtype = ir.DataType(attributes["output_dtype"])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = node.name, like.shape, ir.TensorType(dtype)
    return node


def _rounded(tensor: ir.TensorProtocol, steps: NDArray[np.float32], grid: Grid) -> ir.TensorProtocol:
    """A weight [inputs, outputs] in steps of [outputs] or []."""
    return ir.Tensor(grid.rounded(tensor.numpy().astype(np.float32) / steps))


def _layers(model: ir.Model) -> Iterator[tuple[str, tuple[ir.Node, ir.Node]]]:
    """Modules with the QuantizeLinear of their input and the DequantizeLinear of their weight.

    One whose input is divided by one scale and multiplied by another is none of them.
    """
    for node in model.graph:
        made = [value.producer() if value else None for value in node.inputs] if node.op_type == "MatMul" else []
        match made:
            case [ir.Node(op_type="DequantizeLinear") as back, ir.Node(op_type="DequantizeLinear") as weight]:
                small = back.inputs[0].producer() if back.inputs[0] else None
                if node.name and small is not None and small.inputs[1] is back.inputs[1]:
                    yield node.name.rpartition("/")[0], (small, weight)


class ExactInputs(InPlacePass):
    """Linear layers read their inputs as they are; their weights stay rounded."""

    def call(self, model: ir.Model) -> PassResult:
        found = list(_layers(model))
        for _, (small, _) in found:
            (back,) = small.outputs[0].consumers()
            x = small.inputs[0]
            assert x is not None
            back.outputs[0].replace_all_uses_with(x)
            model.graph.remove([back, small], safe=True)
        drop_unused(model.graph)
        return PassResult(model, modified=bool(found))


def write(kind: str, ranges: Mapping[str, Ranges]) -> InsertQdq:
    """See `Way`."""
    return InsertQdq(kind, ranges)


def exact() -> list[InPlacePass]:
    """See `Way`."""
    return [ExactInputs()]


def fast() -> list[InPlacePass]:
    """See `Way`: products of 8 bits are what the file asks for."""
    return []


def read(path: Path) -> Iterator[Quantised]:
    """Every such layer of an ONNX file, one at a time."""
    for module, (small, back) in _layers(load_onnx(path)):
        numbers, steps = (array_of(value) for value in back.inputs)
        grid = next(grid for grid in GRIDS.values() if grid.dtype.numpy() == numbers.dtype)
        whole, scales = numbers.astype(np.float64), steps.astype(np.float64)
        integers = grid.dtype == ir.DataType.INT8
        # Weights leave out -128, which inputs may become.
        least = -grid.largest - integers
        rounding = Rounding(float(array_of(small.inputs[1])), least, grid.largest, integers=integers)
        yield Quantised(module, (whole * scales).T, (grid.half_a_step(whole) * scales).T, rounding)
