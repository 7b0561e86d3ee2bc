"""Linear layers with their weights as 4 or 8 bit integers in blocks: MatMul becomes com.microsoft's MatMulNBits. What
becomes of experts is in `expert_weights`.

Steps and zero points are those of ONNX Runtime's own quantizer. Embedding, norms, routers and everything about the
rotation stay what they are. N outputs, K inputs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.config import ExportConfig
from fope_export.dtypes import FP32
from fope_export.errors import ExportError, require
from fope_export.graph.base import Pass
from fope_export.graph.builder import MICROSOFT, GraphBuilder
from fope_export.graph.compensation import Moments, compensated
from fope_export.graph.expert_weights import ExactExperts, QuantizeExperts, RoundExpertInputs, is_experts, stored
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Measured, Quantized, array_of, linear_weight
from fope_export.quantizations import COMPENSATED, NEAREST

OPERATOR = "MatMulNBits"
SMALLEST = 32
"""Inputs of a block at least."""
EXACT = 1
"""The operator's accuracy_level that leaves activations in float32."""
INT8 = 4
"""The one that rounds them to 8 bits, each block with a scale of its own: several times faster."""


class QuantizeWeights(Pass):
    """Have linear layers read `<weight>.<kind>`, `.scales` and `.zero_points` in place of `<weight>.T`.

    Weights are read and quantized one at a time.
    """

    def __init__(self, config: ExportConfig, moments: Moments | None = None) -> None:
        """To the nearest integers, or with the layers' inputs in mind, of which there are `moments` then.

        Raises BackendError where ONNX Runtime, which brings the quantizer, is not installed.
        """
        super().__init__()
        assert config.quantization and config.quantize and config.block
        self._kind, self.bits = config.quantize, ir.DataType[config.quantization.element].bitwidth
        self._block, self._moments = config.block, moments
        _tools()

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
        rounding = COMPENSATED if self._moments else NEAREST
        model.metadata_props["fope.quantiser"] = (
            f"onnxruntime {library.__version__}, {self._kind}, blocks of {self._block}, {rounding}"
        )
        return PassResult(model, modified=True)

    def _replace(self, node: ir.Node, weight: ir.Value, builder: GraphBuilder) -> None:
        """Turn the call into one of the operator. A weight that nothing else reads leaves the graph."""
        assert weight.name and weight.const_value is not None and node.name
        inputs, outputs = weight.const_value.shape.numpy()
        block, path = block_of(inputs, self._block), node.name.rpartition("/")[0]
        arrays = self._rounded(weight.name, weight.const_value.numpy(), block, path)
        node.op_type, node.domain = OPERATOR, MICROSOFT
        node.name = f"{path}/{OPERATOR}"
        node.resize_inputs(1 + len(arrays))
        for port, (array, part) in enumerate(zip(arrays, (self._kind, "scales", "zero_points"), strict=True), start=1):
            tensor = ir.Tensor(array, name=f"{weight.name.removesuffix('.T')}.{part}")
            node.replace_input_with(port, builder.initializer(tensor))
        numbers = {"K": inputs, "N": outputs, "bits": self.bits, "block_size": block, "accuracy_level": EXACT}
        node.attributes.update((name, ir.AttrInt64(name, number)) for name, number in numbers.items())
        if node.outputs[0] not in builder.graph.outputs:
            node.outputs[0].name = node.name
        if not weight.uses():
            builder.graph.initializers.pop(weight.name)

    def _rounded(
        self, name: str, weight: NDArray[Any], block: int, path: str
    ) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]:
        """The operator's packed integers, steps and packed zero points for a weight [K, N] of the layer at `path`."""
        packed, steps, zeros = nearest(self.bits, name, weight, block)
        if self._moments:
            shape = packed.shape[:2]
            grid = steps.reshape(shape), _unpacked(zeros.reshape(len(packed), -1), self.bits)[:, : shape[1]]
            each, offset = (torch.from_numpy(part.astype(np.float32)).T for part in grid)
            whole = compensated(
                torch.from_numpy(weight.astype(np.float32)), each, offset, block=block, largest=2**self.bits - 1,
                moments=self._moments.of(path),
            )  # fmt: skip
            packed = _packed(packed, whole.T.numpy().astype(np.uint8), self.bits)
        return packed, steps, zeros

    def ensures(self, model: ir.Model) -> None:
        if left := [node.name for node in model.graph if linear_weight(node) is not None]:
            raise PostconditionError(f"{left[0]} is not quantized")


def _tools() -> Any:
    with _no_root_logger():
        return require("onnxruntime.quantization.matmul_nbits_quantizer", "run")


def nearest(
    bits: int, name: str, weight: NDArray[Any], block: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]:
    """A weight [K, N] as the operator's packed integers, steps and packed zero points. Raises ExportError where these
    stand for numbers that its dtype cannot hold.
    """
    tools = _tools()
    config = tools.DefaultWeightOnlyQuantConfig(block_size=block, bits=bits)
    with np.errstate(over="ignore", invalid="ignore"):  # said by name instead
        packed, steps, zeros = tools.DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    _check_range(name, packed, steps, zeros, bits=bits)
    return packed, steps, zeros


def block_of(inputs: int, wanted: int) -> int:
    """The largest block of `wanted`, half of it and so on that divides a layer's inputs, or the smallest."""
    return next((block for block in _halves(wanted) if inputs % block == 0), SMALLEST)


def _halves(block: int) -> Iterator[int]:
    while block > SMALLEST:
        yield block
        block //= 2


def write(config: ExportConfig, measured: Measured) -> list[Pass]:
    """The passes that round weights as the row of `config` says: to the nearest where nothing was `measured`, and those
    of experts always.
    """
    assert (isinstance(measured, Moments) and config.rounding == COMPENSATED) or measured is None
    linear = QuantizeWeights(config, measured)
    assert config.quantize and config.block
    return [linear, QuantizeExperts(config.quantize, config.block, partial(nearest, linear.bits))]


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


def plain() -> list[Pass]:
    """No pass: every runtime that has the operator has its numbers."""
    return []


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


def _packed(like: NDArray[np.uint8], integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers [N, K] as they are in `like`, of whose last block nothing else may be used."""
    whole = _unpacked(like, bits).astype(np.uint8)
    whole.reshape(len(whole), -1)[:, : integers.shape[1]] = integers
    return whole if bits == 8 else np.bitwise_or(whole[..., ::2], whole[..., 1::2] << 4, dtype=np.uint8)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """The integers along the last axis; of two in a byte the low half comes first."""
    if bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
    return packed.astype(np.int16)
