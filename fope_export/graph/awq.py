"""Weights as 4 bit integers in blocks of 128 inputs, after what inputs are multiplied by and weights divided by (AWQ,
Lin et al., arXiv:2306.00978): large inputs' weights then lose less. NVIDIA Model Optimizer searches for these factors.

The factors stay in front of the product, as Model Optimizer writes them: norms keep the checkpoint's weights.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fope_export.config import ExportConfig
from fope_export.errors import require
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import Measured, Quantized, array_of, like, module_of
from fope_export.graph.weight_only import RoundWeights, check_range, dequantize, largest, least, rounded
from fope_export.quantizations import QUANTIZATIONS

BLOCK = 128
"""Inputs that share a step; half of it and so on where that does not divide a layer's."""
LARGEST = 7
"""-8 is left out, so that numbers are symmetric."""
PRESCALE = "pre_quant_scale"
"""What the factors' name ends with, which is Model Optimizer's for them."""


def _round(
    scales: Mapping[str, NDArray[np.float32]], numbers: str, builder: GraphBuilder, name: str, weight: NDArray[Any],
    node: ir.Node,
) -> ir.Value:  # fmt: skip
    """A `weight_only.Rounding`, with the factors [K] of layers by name and what the integers' name ends with."""
    module, x = module_of(node), node.inputs[0]
    scale = scales[module].astype(weight.dtype)
    assert x is not None and x.dtype is not None
    factors = builder.constant(f"{module}.{PRESCALE}", scale)
    node.replace_input_with(0, like(x, x.dtype, builder.within(module, before=node).op("Mul", x, factors)))
    scaled = weight.astype(np.float32) / scale.astype(np.float32)[:, None]
    integers, steps = in_steps(name, scaled, weight.dtype)
    return dequantize(
        builder, name, integers, numbers, builder.constant(f"{name}.scale", steps), len(weight) // len(steps)
    )


def in_steps(name: str, weight: NDArray[np.float32], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A weight [K, N] as integers [K, N] and steps [K / block, N] of a dtype. Raises ExportError where it does not hold
    what they stand for.
    """
    block = next(size for size in (BLOCK >> i for i in range(BLOCK)) if len(weight) % size == 0)
    ends = largest(weight, block)
    check_range(name, ends * np.float32(1.01), dtype)  # steps are rounded, and may be larger
    steps = np.maximum(ends / LARGEST, least(dtype)).astype(dtype)
    each = steps.astype(np.float32).repeat(block, axis=0)
    return np.rint(weight / each).clip(-LARGEST, LARGEST).astype(ml_dtypes.int4), steps


def write(config: ExportConfig, measured: Measured) -> list[Pass]:
    """The pass that rounds weights after the factors that were `measured`."""
    assert config.quantize and isinstance(measured, Mapping)
    row, optimizer = QUANTIZATIONS[config.quantize], require("modelopt", "modelopt")
    rounding = partial(_round, cast("Mapping[str, NDArray[np.float32]]", measured), row.numbers)
    return [RoundWeights(rounding, f"nvidia-modelopt {optimizer.__version__}, {row.name}")]


def read(path: Path) -> Iterator[Quantized]:
    """Every such layer of an ONNX file, one at a time."""
    for layer in rounded(load_onnx(path)):
        integers, steps = (array_of(value).astype(np.float64) for value in layer.back.inputs)
        each = steps.repeat(layer.block, axis=0)
        scale = _prescale(layer.product)
        allowed = 0.51 * each * (1.0 if scale is None else scale[:, None])
        yield Quantized(layer.module, (integers * each).T, allowed.T, cast=True, prescale=scale)


def _prescale(product: ir.Node) -> NDArray[np.float64] | None:
    """What a layer's input is multiplied by, if it is."""
    made = product.inputs[0].producer() if product.inputs[0] is not None else None
    factors = made.inputs[1] if made is not None and made.op_type == "Mul" else None
    if factors is None or not (factors.name or "").endswith(PRESCALE):
        return None
    return array_of(factors).astype(np.float64)


def exact() -> list[Pass]:
    """No pass: inputs are not rounded."""
    return []


def fast() -> list[Pass]:
    """No pass: it is written for TensorRT."""
    return []


def plain() -> list[Pass]:
    """No pass: every runtime has these numbers."""
    return []
