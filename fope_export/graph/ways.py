"""What the ways to round linear layers have in common: the protocol of their modules, and what they read and write."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fope_export.config import ExportConfig
from fope_export.graph.base import Pass
from fope_export.graph.calibration import Ranges
from fope_export.graph.compensation import Moments
from fope_export.quantizations import Quantization

Measured = Mapping[str, Ranges] | Moments | None
"""On sample text: the ranges of layers by name, where inputs are rounded too; or their inputs' moments."""


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
    allowed: NDArray[np.float64]  # the same, how far from it the original may have been
    rounding: Rounding | None = None  # of its inputs
    leaf: str = "weight"

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


def way_of(row: Quantization) -> Way:
    """Its home, imported."""
    return cast("Way", import_module(row.home))


def linear_weight(node: ir.Node) -> ir.Value | None:
    """A linear layer's weight; None for other nodes, and for a router, where rounding would choose other experts."""
    value = node.inputs[1] if node.op_type == "MatMul" else None
    if value is None or not value.is_initializer() or not (value.name or "").endswith(".T"):
        return None
    return None if (value.name or "").endswith(".router.weight.T") else value


def array_of(value: ir.Value | None) -> NDArray[Any]:
    """The numbers of an initializer."""
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()
