"""Weights as 4 bit floating point numbers (E2M1) in blocks of 16 inputs, whose steps are 8 bit ones (E4M3) times one
number of the whole weight: NVFP4. Inputs are not rounded: ONNX has no operator that finds their steps.

That number is a power of two, so that steps and weights have few digits and float16 and bfloat16 hold them exactly.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.config import ExportConfig
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder, maker
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Measured, Quantized, array_of, like
from fope_export.graph.weight_only import (
    DEQUANTIZE,
    Rounded,
    RoundWeights,
    check_range,
    dequantize,
    largest,
    least,
    rounded,
)
from fope_export.quantizations import QUANTIZATIONS

BLOCK = 16
"""Inputs that share a step."""
LARGEST, LARGEST_STEP = 6.0, 448.0
"""Of E2M1 and E4M3."""
DOUBLED = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.int8)
"""Twice what the 16 numbers of E2M1 are, by their bits."""


def _round(numbers: str, builder: GraphBuilder, name: str, weight: NDArray[Any], _: ir.Node) -> ir.Value:
    """A `weight_only.Rounding`, with what the numbers' name ends with."""
    small, steps, power = in_steps(name, weight.astype(np.float32), weight.dtype)
    inner = builder.within(f"{builder.scope}/scale", before=builder.before)
    names = builder.constant(f"{name}.block_scale", steps), builder.constant(f"{name}.scale", power)
    each = inner.op(DEQUANTIZE, *names)
    like(names[0], ir.DataType.from_numpy(weight.dtype), each)
    return dequantize(builder, name, small, numbers, each, BLOCK)


def in_steps(
    name: str, weight: NDArray[np.float32], dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A weight [K, N] as E2M1 numbers [K, N], E4M3 steps [K / BLOCK, N] and their power of two, of a dtype. Raises
    ExportError where the dtype does not hold what they stand for.
    """
    wanted = largest(weight, BLOCK) / LARGEST
    whole = max(float(wanted.max()) / LARGEST_STEP, least(dtype))
    power = np.float32(2.0 ** np.ceil(np.log2(whole)))
    steps = (wanted / power).astype(ml_dtypes.float8_e4m3fn)
    each = steps.astype(np.float32) * power
    check_range(name, LARGEST * each, dtype)
    each = each.repeat(BLOCK, axis=0)
    values = np.divide(weight, each, out=np.zeros_like(weight), where=each > 0).clip(-LARGEST, LARGEST)
    return values.astype(ml_dtypes.float4_e2m1fn), steps, np.asarray(power, dtype)


def half_a_step(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far rounding may have moved what became `values`, and a little more: E2M1 has 1 bit, down to a half."""
    half: NDArray[np.float64] = 0.255 * 2.0 ** np.floor(np.log2(np.maximum(np.abs(values), 1)))
    return half


class WidenNumbers(Pass):
    """For runtimes without E2M1: its bits are read as integers, which say where in a table twice the number is, and the
    power of two is half as large. The weights are the same bytes.
    """

    def requires(self, model: ir.Model) -> None:
        if not any(_in_e2m1(model)):
            raise PreconditionError("no weight is in E2M1")

    def call(self, model: ir.Model) -> PassResult:
        builder = GraphBuilder(model)
        for layer in list(_in_e2m1(model)):
            scope = builder.within(f"{layer.module}/weight", before=layer.back)
            bits, step = layer.back.inputs[0], maker(layer.back.inputs[1], DEQUANTIZE)
            power = step.inputs[1]
            assert bits is not None and bits.const_value is not None and power is not None
            bits.const_value, bits.type = _as_bits(bits.const_value), ir.TensorType(ir.DataType.UINT4)
            where = like(bits, ir.DataType.INT32, scope.op("Cast", bits, to=int(ir.DataType.INT32)))
            table = builder.constant("e2m1.doubled", DOUBLED)
            layer.back.replace_input_with(0, like(bits, ir.DataType.INT8, scope.op("Gather", table, where)))
            half = array_of(power)
            step.replace_input_with(1, builder.constant(f"{power.name}.half", (half / half.dtype.type(2))))
            builder.graph.initializers.pop(power.name or "")
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if left := next(_in_e2m1(model), None):
            raise PostconditionError(f"the weight of {left.module} is in E2M1")


def _in_e2m1(model: ir.Model) -> Iterator[Rounded]:
    for layer in rounded(model):
        small = layer.back.inputs[0]
        if small is not None and small.dtype == ir.DataType.FLOAT4E2M1:
            yield layer


def _as_bits(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same tensor as integers from 0 to 15, wherever it lies."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, ir.DataType.UINT4, shape=tensor.shape,
            name=tensor.name or "", base_dir=tensor.base_dir,
        )  # fmt: skip
    return ir.Tensor((tensor.numpy().view(np.uint8) & 15).astype(ml_dtypes.uint4), name=tensor.name)


def write(config: ExportConfig, measured: Measured) -> list[Pass]:
    """The pass that rounds weights to the nearest: nothing is `measured`."""
    assert config.quantize and measured is None
    row = QUANTIZATIONS[config.quantize]
    return [RoundWeights(partial(_round, row.numbers), f"fope-export, {row.name}")]


def read(path: Path) -> Iterator[Quantized]:
    """Every such layer of an ONNX file, one at a time."""
    for layer in rounded(load_onnx(path)):
        values, step = array_of(layer.back.inputs[0]).astype(np.float64), maker(layer.back.inputs[1], DEQUANTIZE)
        steps, power = (array_of(value).astype(np.float64) for value in step.inputs)
        each = (steps * power).repeat(layer.block, axis=0)
        lost = LARGEST * 2.0**-10 * power  # half of E4M3's smallest: a block that is smaller becomes 0
        yield Quantized(layer.module, (values * each).T, (half_a_step(values) * each + lost).T, cast=True)


def exact() -> list[Pass]:
    """No pass: inputs are not rounded."""
    return []


def fast() -> list[Pass]:
    """No pass: it is written for TensorRT."""
    return []


def plain() -> list[Pass]:
    """What ONNX Runtime's CPU computes in the place of E2M1."""
    return [WidenNumbers()]
