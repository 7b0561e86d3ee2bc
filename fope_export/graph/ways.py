"""What the ways to round linear layers have in common: the protocol of their modules, and what they read and write."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fope_export.config import ExportConfig
from fope_export.graph.base import Pass
from fope_export.graph.calibration import Ranges
from fope_export.graph.compensation import Moments
from fope_export.quantizations import Quantization

Measured = Mapping[str, Ranges] | Mapping[str, NDArray[np.float32]] | Moments | None
"""On sample text: the ranges of layers by name, where inputs are rounded too; what inputs are multiplied by; or their
moments.
"""


class Rounding(NamedTuple):
    """How a linear layer rounds its inputs: to integers, or E4M3 numbers, from least to largest, times scale."""

    scale: float
    least: float
    largest: float
    integers: bool


class Quantized(NamedTuple):
    """A weight of a linear layer, or of all of a mixture's experts, as a file holds it."""

    module: str
    weight: NDArray[np.float64]  # [outputs, inputs], or [experts, outputs, inputs]
    allowed: NDArray[np.float64]  # the same, how far from it, times the prescale, the original may have been
    rounding: Rounding | None = None  # of its inputs
    leaf: str = "weight"
    cast: bool = False  # whether it is a tensor of the file's dtype before it is multiplied
    prescale: NDArray[np.float64] | None = None  # [inputs], by which the file multiplies what the layer reads

    def for_inputs(self, precision: torch.dtype) -> torch.Tensor:
        """The weight in float64 for inputs as they are, where the file computes in some precision."""
        weight = torch.from_numpy(self.weight)
        if self.cast:
            weight = weight.to(precision).double()
        return weight if self.prescale is None else weight * torch.from_numpy(self.prescale)

    @property
    def name(self) -> str:
        return f"{self.module}.{self.leaf}"


class Way(Protocol):
    """One way to round linear layers: the functions of the module that a row of `QUANTIZATIONS` names as its `home`."""

    def write(self, config: ExportConfig, measured: Measured) -> list[Pass]:
        """The passes that round a graph's linear layers as a resolved `config` says, with what was measured for it.
        Raises BackendError where the quantizer is not installed.
        """
        ...

    def read(self, path: Path) -> Iterator[Quantized]:
        """Every weight that the pass has rounded in the ONNX file at `path`, one at a time."""
        ...

    def exact(self) -> list[Pass]:
        """Passes after which weights stay rounded and inputs are read as they are; none where they always are."""
        ...

    def fast(self) -> list[Pass]:
        """Passes that make the optimized file faster by rounding inputs too; none where there is no such thing."""
        ...

    def plain(self) -> list[Pass]:
        """Passes that make a copy of the portable file with numbers that every runtime has; none where it has those."""
        ...


def way_of(row: Quantization) -> Way:
    """Its home, imported."""
    return cast("Way", import_module(row.home))


def linear_weight(node: ir.Node) -> ir.Value | None:
    """A linear layer's weight; None for other nodes, and for a router, where rounding would choose other experts."""
    value = node.inputs[1] if node.op_type == "MatMul" else None
    if value is None or not value.is_initializer() or not (value.name or "").endswith(".T"):
        return None
    return None if (value.name or "").endswith(".router.weight.T") else value


def module_of(node: ir.Node) -> str:
    """The path of the torch module that a node is named after."""
    return (node.name or "").rpartition("/")[0]


def like(other: ir.Value, dtype: ir.DataType, value: ir.Value) -> ir.Value:
    """`value`, known to have the shape of another."""
    value.shape, value.type = other.shape, ir.TensorType(dtype)
    return value


def array_of(value: ir.Value | None) -> NDArray[Any]:
    """The numbers of an initializer."""
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()
