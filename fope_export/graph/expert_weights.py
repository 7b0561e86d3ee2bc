"""Experts with their weights as 4 or 8 bit integers in blocks: standard DequantizeLinear in the portable file, and ONNX
Runtime's QMoE, which rounds inputs too, in the optimized one. Both read the same bytes.

N experts; their weights are [N, rows, inputs].
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.graph.base import Pass
from fope_export.graph.builder import MICROSOFT, GraphBuilder, maker
from fope_export.graph.experts import DEQUANTIZE, MIXTURE, Mixture, mixtures
from fope_export.graph.ways import Quantized, array_of
from fope_export.quantizations import QUANTIZATIONS

OF_INTEGERS = "QMoE"
SMALLEST = 16
"""Inputs that share a scale, at least: QMoE has no smaller blocks."""
NUMBERS, ZEROS = ((2, 3), (5, 6)), (11, 12)
"""Ports of QMoE: integers and scales of both weights, and their zero points."""
Rounding = Callable[[str, NDArray[np.floating], int], tuple[NDArray[np.generic], ...]]
"""A weight's name, it as [inputs, rows], and inputs of a block -> packed [rows, blocks, bytes], scales and zero points
by row.
"""


class QuantizeExperts(Pass):
    """Have experts' products read `<weight>.<kind>`, `.scales` and `.zero_points` in the place of `<weight>`, each
    expert rounded as a linear layer is. Those whose widths no block divides stay as they are.
    """

    def __init__(self, kind: str, block: int, rounding: Rounding) -> None:
        """Of a row, in blocks of `block` inputs, or of a half of it, or of a half of that."""
        super().__init__()
        self._kind, self._dtype = kind, ir.DataType[f"U{QUANTIZATIONS[kind].element}"]
        self._block, self._rounding = block, rounding

    def requires(self, model: ir.Model) -> None:
        mixtures(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        builder, found = GraphBuilder(model), list(self._unrounded(model.graph))
        for mixture, block in found:
            for product, weight in zip(mixture.products, mixture.stored, strict=True):
                here = builder.within(mixture.path, before=product)
                product.replace_input_with(0, self._rounded(here, weight, block))
                builder.graph.initializers.pop(weight.name or "")
        return PassResult(model, modified=bool(found))

    def _unrounded(self, graph: ir.Graph) -> Iterator[tuple[Mixture, int]]:
        """With the block that each can be rounded in."""
        for mixture in mixtures(graph):
            widths = [_shape(value)[2] for value in mixture.stored if value.is_initializer()]
            if widths and (block := self._fitting(widths)):
                yield mixture, block

    def _fitting(self, widths: Sequence[int]) -> int:
        """The largest block that divides all of them, and leaves no byte of zero points half empty; 0 for none."""
        block, bits = self._block, self._dtype.bitwidth
        while block >= SMALLEST and any(bits * width % (8 * block) for width in widths):
            block //= 2
        return block if block >= SMALLEST else 0

    def _rounded(self, builder: GraphBuilder, weight: ir.Value, block: int) -> ir.Value:
        assert weight.name and weight.const_value is not None
        name, shape = weight.name, _shape(weight)
        parts = (self._rounding(name, np.ascontiguousarray(each.T), block) for each in array_of(weight))
        packed, scales, zeros = map(np.stack, zip(*parts, strict=True))
        blocks = (*shape[:2], shape[2] // block)
        inputs = (
            _integers(packed, self._dtype, shape, f"{name}.{self._kind}"),
            ir.Tensor(scales.reshape(blocks), name=f"{name}.scales"),
            _integers(zeros, self._dtype, blocks, f"{name}.zero_points"),
        )
        return _dequantized(builder, [builder.initializer(tensor) for tensor in inputs], block)

    def ensures(self, model: ir.Model) -> None:
        if left := [mixture.path for mixture, _ in self._unrounded(model.graph)]:
            raise PostconditionError(f"the experts of {left[0]} are not quantized")


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _integers(bytes_: NDArray[np.generic], dtype: ir.DataType, shape: Sequence[int], name: str) -> ir.TensorProtocol:
    """Numbers of which a byte holds one, or two, the low half first."""
    if dtype.bitwidth == 8:
        return ir.Tensor(bytes_.reshape(shape), dtype=dtype, name=name)
    return ir.PackedTensor(bytes_.reshape(-1), dtype, shape=shape, name=name)


def _dequantized(builder: GraphBuilder, inputs: Sequence[ir.Value], block: int) -> ir.Value:
    """What the integers, scales and zero points of a weight stand for."""
    numbers, scales, _ = inputs
    name = (numbers.name or "").split(".")[-2]
    made = builder.op(DEQUANTIZE, *inputs, name=name, axis=2, block_size=block)
    made.shape, made.type = numbers.shape, scales.type
    return made


class RoundExpertInputs(Pass):
    """Mixtures with integer weights multiply integers (QMoE), and round their inputs for that: to 8 bits with the
    `accuracy_level` that says so, and always where weights have 8.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def requires(self, model: ir.Model) -> None:
        for node in _dequantizing(model.graph):
            first, last = (maker(node.inputs[port], DEQUANTIZE) for port in (2, 4))
            if first.attributes["block_size"].value != last.attributes["block_size"].value:
                raise PreconditionError(f"{node.name} has weights in two sizes of blocks")

    def call(self, model: ir.Model) -> PassResult:
        builder, found = GraphBuilder(model), list(_dequantizing(model.graph))
        for node in found:
            self._replace(builder.within((node.name or "").rpartition("/")[0], before=node), node)
        return PassResult(model, modified=bool(found))

    def _replace(self, builder: GraphBuilder, node: ir.Node) -> None:
        made = [maker(node.inputs[port], DEQUANTIZE) for port in (2, 4)]
        (proj, out), bits = (each.inputs for each in made), _bits(made[0].inputs[0])
        for value in (proj[0], proj[2], out[0], out[2]):
            _read_as(value, ir.DataType.UINT8)
        known = {name: attribute.value for name, attribute in node.attributes.items()}
        (mixed,) = builder.ops(
            OF_INTEGERS, *node.inputs[:2], *proj[:2], None, *out[:2], *[None] * 4, proj[2], out[2], outputs=1,
            domain=MICROSOFT, **known, expert_weight_bits=bits, block_size=made[0].attributes["block_size"].value,
            accuracy_level=self._level,
        )  # fmt: skip
        _take_place(builder, node, mixed)

    def ensures(self, model: ir.Model) -> None:
        if left := [node.name for node in _dequantizing(model.graph)]:
            raise PostconditionError(f"{left[0]} reads its inputs as they are")


def _dequantizing(graph: ir.Graph) -> Iterator[ir.Node]:
    """Mixtures whose weights are made of integers."""
    for node in graph:
        makers = [node.inputs[port] for port in (2, 4)] if node.op_type == MIXTURE else []
        if makers and all(value and (made := value.producer()) and made.op_type == DEQUANTIZE for value in makers):
            yield node


def _bits(value: ir.Value | None) -> int:
    assert value is not None and value.dtype is not None
    return int(value.dtype.bitwidth)


def _read_as(value: ir.Value | None, dtype: ir.DataType) -> None:
    """Have the bytes of an initializer be integers of another width, as many along the last axis as there are."""
    assert value is not None and value.const_value is not None and value.name
    tensor, old = value.const_value, value.const_value.dtype
    *rows, last = _shape(value)
    shape = (*rows, last * old.bitwidth // dtype.bitwidth)
    if isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, dtype, shape=ir.Shape(shape), name=value.name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
    else:
        value.const_value = _integers(np.frombuffer(tensor.tobytes(), np.uint8), dtype, shape, value.name)
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)


def _take_place(builder: GraphBuilder, node: ir.Node, mixed: ir.Value) -> None:
    old = node.outputs[0]
    mixed.shape, mixed.type = old.shape, old.type
    old.replace_all_uses_with(mixed)
    builder.remove(node)


class ExactExperts(Pass):
    """Mixtures with integer weights read their inputs as they are: MoE, with what the integers stand for."""

    def requires(self, model: ir.Model) -> None:
        for node in _of_integers(model.graph):
            if any(value is None or not value.is_initializer() for value in (node.inputs[i] for i in (2, 5, *ZEROS))):
                raise PreconditionError(f"{node.name} has weights that are no numbers")

    def call(self, model: ir.Model) -> PassResult:
        builder, found = GraphBuilder(model), list(_of_integers(model.graph))
        for node in found:
            _dequantize(builder.within((node.name or "").rpartition("/")[0], before=node), node)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if left := [node.name for node in _of_integers(model.graph)]:
            raise PostconditionError(f"{left[0]} rounds its inputs")


def _of_integers(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type == OF_INTEGERS)


def _dequantize(builder: GraphBuilder, node: ir.Node) -> None:
    known = {name: attribute.value for name, attribute in node.attributes.items()}
    bits, block, _ = (known.pop(name) for name in ("expert_weight_bits", "block_size", "accuracy_level"))
    weights = []
    for (numbers, scales), zeros in zip(NUMBERS, ZEROS, strict=True):
        inputs = [value for value in (node.inputs[port] for port in (numbers, scales, zeros)) if value is not None]
        for value in (inputs[0], inputs[2]):
            _read_as(value, ir.DataType[f"UINT{bits}"])
        weights.append(_dequantized(builder, inputs, block))
    mixed = builder.op(MIXTURE, *node.inputs[:2], weights[0], None, weights[1], None, domain=MICROSOFT, **known)
    _take_place(builder, node, mixed)


def is_experts(node: ir.Node) -> bool:
    """Whether a node of a portable file makes an expert's weights of integers."""
    return node.op_type == DEQUANTIZE and "block_size" in node.attributes


def stored(node: ir.Node) -> Quantized:
    """What it makes."""
    numbers, scales, zeros = (array_of(value) for value in node.inputs)
    block, steps = node.attributes["block_size"].as_int(), np.abs(scales.astype(np.float64))
    whole = numbers.astype(np.int16) - np.repeat(zeros.astype(np.int16), block, axis=2)
    # Half a step to the nearest integer, and the rounding of the scale itself, which a float16 one may show.
    allowed = 0.51 * steps + 2 ** _bits(node.inputs[0]) * np.spacing(np.abs(scales)).astype(np.float64)
    module, _, leaf = (node.name or "").rpartition(f"/{DEQUANTIZE}.")
    weight, each = (np.repeat(array, block, axis=2) for array in (scales.astype(np.float64), allowed))
    return Quantized(module, whole * weight, each, leaf=leaf)
