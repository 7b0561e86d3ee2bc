"""Linear layers with inputs and weights rounded to 8 bits, written as QuantizeLinear and DequantizeLinear.

This is the form that TensorRT fuses into products of 8 bits. Scales are float32 whatever the activations are: float16
would lose digits of the small ones. Embedding, norms, routers, output layer and rotation stay what they are.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.config import ExportConfig
from fope_export.errors import require
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.calibration import Ranges
from fope_export.graph.passes import drop_unused
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Measured, Quantized, Rounding, array_of, like, linear_weight, module_of
from fope_export.quantizations import QUANTIZATIONS

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


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


class InsertQdq(Pass):
    """Have each calibrated linear layer read rounded inputs, and `<weight>.<numbers>` in place of `<weight>.T`.

    Weights are rounded when the file is written, one at a time.
    """

    def __init__(self, kind: str, ranges: Mapping[str, Ranges]) -> None:
        """Of a row; `ranges` are by the layer's name, as `calibrate` finds them."""
        super().__init__()
        self._row, self._ranges = QUANTIZATIONS[kind], ranges
        self._grid = GRIDS[self._row.element]

    def requires(self, model: ir.Model) -> None:
        layers = {module_of(node) for node in model.graph if linear_weight(node) is not None}
        unknown = self._ranges.keys() - layers
        if unknown or not self._ranges:
            raise PreconditionError(f"calibration and graph disagree in {unknown or 'everything'}")

    def call(self, model: ir.Model) -> PassResult:
        builder = GraphBuilder(model)
        for node in list(model.graph):
            module = module_of(node)
            if (weight := linear_weight(node)) is not None and module in self._ranges:
                self._round_weight(builder.within(f"{module}/weight", before=node), node, weight, self._ranges[module])
                self._round_input(builder.within(module, before=node), node, self._ranges[module])
        optimizer = require("modelopt", "modelopt")
        model.metadata_props["fope.quantiser"] = f"nvidia-modelopt {optimizer.__version__}, {self._row.name}"
        return PassResult(model, modified=True)

    def _round_input(self, builder: GraphBuilder, node: ir.Node, ranges: Ranges) -> None:
        x = node.inputs[0]
        assert x is not None and x.dtype is not None
        step = self._scale(builder, f"{builder.scope}.input_scale", np.float32(ranges.inputs))
        small = like(x, self._grid.dtype, builder.op(QUANTIZE, x, step, output_dtype=int(self._grid.dtype)))
        back = like(x, x.dtype, builder.op(DEQUANTIZE, small, step, output_dtype=int(x.dtype)))
        node.replace_input_with(0, back)

    def _round_weight(self, builder: GraphBuilder, node: ir.Node, weight: ir.Value, ranges: Ranges) -> None:
        """A weight that nothing else reads leaves the graph."""
        assert weight.name and weight.const_value is not None
        name, tensor = weight.name.removesuffix(".T"), weight.const_value
        steps = self._scale(builder, f"{name}.scale", ranges.weight)
        read = partial(_rounded, tensor, array_of(steps), self._grid)
        shape, numbers = ir.Shape(tensor.shape.numpy()), self._row.numbers
        small = builder.initializer(ir.LazyTensor(read, self._grid.dtype, shape, name=f"{name}.{numbers}"))
        axis: dict[str, Any] = {"axis": 1} if ranges.weight.ndim else {}
        back = builder.op(DEQUANTIZE, small, steps, **axis, output_dtype=int(tensor.dtype))
        node.replace_input_with(1, like(small, tensor.dtype, back))
        if not weight.uses():
            builder.graph.initializers.pop(weight.name)

    def _scale(self, builder: GraphBuilder, name: str, largest: NDArray[np.float32] | np.float32) -> ir.Value:
        """Of numbers from 0 to `largest`; 1 where that is 0 too."""
        steps = np.where(largest > 0, largest / np.float32(self._grid.largest), 1)
        return builder.initializer(ir.Tensor(np.asarray(steps, np.float32), name=name))

    def ensures(self, model: ir.Model) -> None:
        layers = {module for module, _ in _layers(model)}
        if layers != set(self._ranges):
            raise PostconditionError(f"calibration and graph disagree in {layers ^ set(self._ranges)}")


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
                    yield module_of(node), (small, weight)


class ExactInputs(Pass):
    """Linear layers read their inputs as they are; their weights stay rounded."""

    def requires(self, model: ir.Model) -> None:
        if not any(_layers(model)):
            raise PreconditionError("no layer rounds its inputs")

    def call(self, model: ir.Model) -> PassResult:
        layers = list(_layers(model))
        for _, (small, _) in layers:
            (back,) = small.outputs[0].consumers()
            x = small.inputs[0]
            assert x is not None
            back.outputs[0].replace_all_uses_with(x)
            model.graph.remove([back, small], safe=True)
        drop_unused(model.graph)
        return PassResult(model, modified=bool(layers))

    def ensures(self, model: ir.Model) -> None:
        if left := [module for module, _ in _layers(model)]:
            raise PostconditionError(f"{left[0]} rounds its inputs")


def write(config: ExportConfig, measured: Measured) -> list[Pass]:
    """The pass that rounds weights, and inputs within the ranges that were `measured`, as the config's row says."""
    assert config.quantize and isinstance(measured, Mapping)
    return [InsertQdq(config.quantize, cast("Mapping[str, Ranges]", measured))]


def exact() -> list[Pass]:
    """The pass that takes the rounding of inputs out, and leaves that of weights."""
    return [ExactInputs()]


def fast() -> list[Pass]:
    """No pass: products of 8 bits are what the file asks for."""
    return []


def plain() -> list[Pass]:
    """No pass: every runtime has these numbers."""
    return []


def read(path: Path) -> Iterator[Quantized]:
    """Every such layer of an ONNX file, one at a time."""
    for module, (small, back) in _layers(load_onnx(path)):
        numbers, steps = (array_of(value) for value in back.inputs)
        grid = next(grid for grid in GRIDS.values() if grid.dtype.numpy() == numbers.dtype)
        whole, scales = numbers.astype(np.float64), steps.astype(np.float64)
        integers = grid.dtype == ir.DataType.INT8
        # Weights leave out -128, which inputs may become.
        least = -grid.largest - integers
        rounding = Rounding(float(array_of(small.inputs[1])), least, grid.largest, integers=integers)
        yield Quantized(module, (whole * scales).T, (grid.half_a_step(whole) * scales).T, rounding, cast=True)
