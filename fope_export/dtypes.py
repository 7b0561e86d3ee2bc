"""The dtypes that a model is exported in: one row each, and what differs between them is said here alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Named(Protocol):
    """A row of a table that people choose from, such as a dtype or a quantization."""

    @property
    def name(self) -> str:
        """What the row is called on the command line and in the manifest."""
        ...


def either(rows: Iterable[Named]) -> str:
    """Rows in words: one, another or a third."""
    return " or ".join(row.name for row in rows)


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """Of weights, activations and cache. Angles, series and statistics are float32 in all of them."""

    name: str
    """As `--dtype` and the manifest have it."""
    precision: str
    """As PyTorch calls it, and NumPy where it has it."""
    element: str
    """As ONNX calls it, in lower case."""
    itemsize: int
    """Bytes of a number."""
    apart: float
    """How far a contender of a benchmark may be from eager PyTorch (`greedy.distance`); another model is at about 1."""
    widened: "Dtype | None" = None
    """What a copy is in for a runtime that has no kernels for it; None where all of them have."""
    architecture: int = 0
    """The oldest GPU that TensorRT multiplies it on: 80 is sm80."""
    cuda_attention: bool = False
    """Whether ONNX Runtime's attention takes it on a GPU."""


FP32 = Dtype(name="fp32", precision="float32", element="float", itemsize=4, apart=1e-4)
FP16 = Dtype(name="fp16", precision="float16", element="float16", itemsize=2, apart=2e-2, cuda_attention=True)
BF16 = Dtype(
    name="bf16", precision="bfloat16", element="bfloat16", itemsize=2, apart=1e-1, widened=FP32, architecture=80
)
DTYPES = {row.name: row for row in (FP32, FP16, BF16)}
"""By name; of a module's several dtypes the last counts."""
