"""Linear layers with their weights as 4 or 8 bit integers in blocks: MatMul becomes com.microsoft's MatMulNBits. What
becomes of experts is in `expert_weights`.

The quantizer is ONNX Runtime's own. Embedding, norms, routers and everything about the rotation stay what they are.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.dtypes import FP32
from fope_export.errors import ExportError, require
from fope_export.graph.base import Pass
from fope_export.graph.builder import MICROSOFT, GraphBuilder
from fope_export.graph.calibration import Ranges
from fope_export.graph.expert_weights import (
    ExactExperts,
    QuantizeExperts,
    RoundExpertInputs,
    Rounding,
    is_experts,
    stored,
)
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Quantized, array_of, linear_weight
from fope_export.quantizations import QUANTIZATIONS

OPERATOR = "MatMulNBits"
BLOCK = 32
"""Inputs of a linear layer that share a scale."""
EXACT = 1
"""The operator's accuracy_level that leaves activations in float32."""
INT8 = 4
"""The one that rounds them to 8 bits, each block with a scale of its own: several times faster."""


class QuantizeWeights(Pass):
    """Have linear layers read `<weight>.<kind>`, `.scales` and `.zero_points` in place of `<weight>.T`.

    Weights are read and quantized one at a time.
    """

    def __init__(self, kind: str) -> None:
        """Of a row. Raises BackendError where ONNX Runtime, which brings the quantizer, is not installed."""
        super().__init__()
        self._kind, self._bits, self._rounded = kind, _bits_of(kind), rounding(kind, BLOCK)

    def requires(self, model: ir.Model) -> None:
        if not any(map(linear_weight, model.graph)):
            raise PreconditionError("the model has no linear layer to quantize")

    def call(self, model: ir.Model) -> PassResult:
        builder = GraphBuilder(model)
        for node in list(model.graph):
            if (weight := linear_weight(node)) is not None:
                self._replace(node, weight, builder)
        model.opset_imports[MICROSOFT] = 1
        library = require("onnxruntime", "run")
        model.metadata_props["fope.quantiser"] = f"onnxruntime {library.__version__}, {self._kind}, blocks of {BLOCK}"
        return PassResult(model, modified=True)

    def _replace(self, node: ir.Node, weight: ir.Value, builder: GraphBuilder) -> None:
        """Turn the call into one of the operator. A weight that nothing else reads leaves the graph."""
        assert weight.name and weight.const_value is not None and node.name
        inputs, outputs = weight.const_value.shape.numpy()
        arrays = self._rounded(weight.name, weight.const_value.numpy())
        node.op_type, node.domain = OPERATOR, MICROSOFT
        node.name = f"{node.name.rpartition('/')[0]}/{OPERATOR}"
        node.resize_inputs(1 + len(arrays))
        for port, (array, part) in enumerate(zip(arrays, (self._kind, "scales", "zero_points"), strict=True), start=1):
            tensor = ir.Tensor(array, name=f"{weight.name.removesuffix('.T')}.{part}")
            node.replace_input_with(port, builder.initializer(tensor))
        numbers = {"K": inputs, "N": outputs, "bits": self._bits, "block_size": BLOCK, "accuracy_level": EXACT}
        node.attributes.update((name, ir.AttrInt64(name, number)) for name, number in numbers.items())
        if node.outputs[0] not in builder.graph.outputs:
            node.outputs[0].name = node.name
        if not weight.uses():
            builder.graph.initializers.pop(weight.name)

    def ensures(self, model: ir.Model) -> None:
        if left := [node.name for node in model.graph if linear_weight(node) is not None]:
            raise PostconditionError(f"{left[0]} is not quantized")


def _bits_of(kind: str) -> int:
    return int(ir.DataType[QUANTIZATIONS[kind].element].bitwidth)


def rounding(kind: str, block: int) -> Rounding:
    """What rounds one weight of the row `kind`, in blocks of so many inputs. Raises BackendError where ONNX Runtime is
    not installed, and ExportError, when it is called, for a weight that it makes too large.
    """
    bits = _bits_of(kind)
    with _no_root_logger():
        tools = require("onnxruntime.quantization.matmul_nbits_quantizer", "run")
    quantizer = tools.DefaultWeightOnlyQuantizer(tools.DefaultWeightOnlyQuantConfig(block_size=block, bits=bits))

    def rounded(name: str, weight: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        with np.errstate(over="ignore", invalid="ignore"):  # said by name instead
            packed, scales, zero_points = quantizer.qbits_block_quant(weight)
        _check_range(name, packed, scales, zero_points, bits=bits)
        return packed, scales, zero_points

    return rounded


def write(kind: str, ranges: Mapping[str, Ranges]) -> list[Pass]:  # noqa: ARG001
    """The passes that round weights as the row `kind` says; they need no `ranges`, as inputs stay as they are."""
    return [QuantizeWeights(kind), QuantizeExperts(kind, BLOCK, rounding)]


@contextmanager
def _no_root_logger() -> Iterator[None]:
    """The quantizer's module calls logging.basicConfig, which does nothing where the root logger has a handler."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class SetAccuracyLevel(Pass):
    """Have every product with integer weights take its inputs with an `accuracy_level`: EXACT or INT8."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def requires(self, model: ir.Model) -> None:
        if not any(_products(model.graph)):
            raise PreconditionError("no weights are integers")

    def call(self, model: ir.Model) -> PassResult:
        for node in _products(model.graph):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", self._level)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for node in _products(model.graph):
            if (level := node.attributes["accuracy_level"].as_int()) != self._level:
                raise PostconditionError(f"{node.name} has the accuracy_level {level}")


def _products(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type == OPERATOR)


def exact() -> list[Pass]:
    """Products of rounded weights with inputs that are not rounded."""
    return [SetAccuracyLevel(EXACT), ExactExperts()]


def fast() -> list[Pass]:
    """Products of rounded weights with inputs that are rounded to 8 bits as they come."""
    return [SetAccuracyLevel(INT8), RoundExpertInputs(INT8)]


def read(path: Path) -> Iterator[Quantized]:
    """Every quantized weight of an ONNX file, one at a time, as the operator defines it: (q - zero point) * scale."""
    for node in load_onnx(path).graph:
        if node.op_type == OPERATOR:
            assert node.name
            yield Quantized(node.name.rpartition("/")[0], *_dequantized(node))
        elif is_experts(node):
            yield stored(node)


def _dequantized(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """From packed uint8 [N, blocks, bytes], scales [N, blocks] and packed zero points [N, bytes]."""
    inputs, bits = (node.attributes[name].as_int() for name in ("K", "bits"))
    packed, scales, zero_points = (array_of(value) for value in node.inputs[1:])
    rows, blocks, _ = packed.shape
    steps = scales.reshape(rows, blocks).astype(np.float64)
    weight = _steps_from_zero(packed, zero_points, bits) * steps[..., None]
    # Half a step to the nearest integer, and the rounding of the scale itself, which a float16 one may show.
    allowed = 0.51 * np.abs(steps) + 2**bits * np.spacing(np.abs(scales)).reshape(rows, blocks).astype(np.float64)
    each = np.broadcast_to(allowed[..., None], weight.shape)
    return weight.reshape(rows, -1)[:, :inputs], each.reshape(rows, -1)[:, :inputs]


def _steps_from_zero(packed: NDArray[np.uint8], zero_points: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """[N, blocks, inputs of a block]"""
    rows, blocks, _ = packed.shape
    return _unpacked(packed, bits) - _unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks, None]


def _check_range(
    name: str, packed: NDArray[np.uint8], scales: NDArray[Any], zero_points: NDArray[np.uint8], *, bits: int
) -> None:
    """Raises ExportError where the rounded weight has numbers that its dtype, which the scales have, cannot hold."""
    last = float(np.finfo(scales.dtype).max)
    largest = float(scales.max()) * 2**bits  # no number is further from 0
    if largest > last and np.isfinite(largest):
        steps = np.abs(_steps_from_zero(packed, zero_points, bits)).max(-1)
        largest = float((steps * scales.reshape(steps.shape).astype(np.float64)).max())
    if not largest <= last:
        raise ExportError(
            f"{name} in {bits} bits reaches {largest:.6g}, and {scales.dtype} ends at {last:.6g}",
            hint=f"Export in {FP32.name}, or without quantize.",
        )


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """The integers along the last axis; of two in a byte the low half comes first."""
    if bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
    return packed.astype(np.int16)
