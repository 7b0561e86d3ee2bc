"""The ways to round linear layers, and those to round caches: one row each, and what differs between them is said here
alone.

The command line reads these rows, so they name the module that does the work instead of importing it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from fope_export.dtypes import FP16, FP32, Dtype

BlockSize: TypeAlias = Literal[32, 64, 128, 256]
"""Inputs of a layer that may share a step."""
RoundingName: TypeAlias = Literal["nearest", "compensated"]
NEAREST, COMPENSATED = "nearest", "compensated"


class Since(NamedTuple):
    """The first ONNX Runtime that has the operators of a bundle, where that is not the first that the others need."""

    version: tuple[int, int]
    dtype: Dtype | None
    """In which it needs that one; None is any."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A way to round linear layers: what it is, who takes it, and by what it is judged."""

    name: str
    """As `--quantize` and the manifest have it; up to a hyphen it ends the names of the rounded weights."""
    element: str
    """What weights become, as ONNX calls it."""
    home: str
    """The module that writes and reads it, which is a `graph.ways.Way`."""
    recipe: str = ""
    """Model Optimizer's, with which layers are calibrated on sample text; nothing where that is not needed."""
    weight_only: bool = False
    """Whether inputs are left as they are although there is a recipe."""
    dtypes: tuple[Dtype, ...] | None = None
    """Those it can be combined with; None is all."""
    since: tuple[Since, ...] = ()
    """Newest first."""
    engines: bool = False
    """Whether TensorRT takes it."""
    widened: bool = False
    """Whether ONNX Runtime has no kernels for its numbers, and runs a copy of the portable file that has others."""
    architecture: int = 0
    """The oldest GPU that TensorRT multiplies it on: 89 is sm89."""
    product: str = ""
    """What older ones lack, in words."""
    block: int = 0
    """Inputs of a layer that share a step, unless somebody says how many; 0 where all of them do."""
    compensates: bool = False
    """Whether weights in blocks are rounded with the layers' inputs in mind, unless somebody says how."""
    growth: float
    """How much of itself a text's perplexity may grow by."""
    blocked: bool = True
    """Whether products add their terms in blocks, as PyTorch does; rounding may cost more where they do not."""
    apart: float = 0.5
    """As `Dtype.apart`: what rounding does to random weights."""

    @property
    def numbers(self) -> str:
        """What the name of a rounded weight ends with."""
        return self.name.partition("-")[0]

    @property
    def calibrated(self) -> bool:
        """Whether Model Optimizer calibrates it."""
        return bool(self.recipe)

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded too, in steps that calibration finds."""
        return self.calibrated and not self.weight_only

    @property
    def rounded(self) -> str:
        """What it rounds, in words."""
        return "weights and inputs" if self.rounds_inputs else "weights"

    def takes(self, dtype: str) -> bool:
        """Whether it can be combined with the dtype of that name."""
        return self.dtypes is None or dtype in [row.name for row in self.dtypes]


_blocks = partial(Quantization, home="fope_export.graph.quantize", dtypes=(FP32, FP16), blocked=False)
_engines = partial(Quantization, since=(Since((1, 32), FP16), Since((1, 24), None)), engines=True)
_qdq = partial(_engines, home="fope_export.graph.qdq")
INT4 = _blocks(name="int4", element="INT4", block=128, compensates=True, growth=0.03)
INT8 = _blocks(name="int8", element="INT8", block=128, growth=0.005)
INT8_QDQ = _qdq(name="int8-qdq", element="INT8", recipe="INT8_DEFAULT_CFG", growth=0.02)
FP8_QDQ = _qdq(
    name="fp8-qdq", element="FLOAT8E4M3FN", recipe="FP8_DEFAULT_CFG", growth=0.01, architecture=89, product="float8"
)
INT4_AWQ = _engines(
    name="int4-awq", element="INT4", home="fope_export.graph.awq", recipe="INT4_AWQ_CFG", weight_only=True, growth=0.02,
    architecture=80, product="int4",
)  # fmt: skip
NVFP4 = _engines(
    name="nvfp4", element="FLOAT4E2M1", home="fope_export.graph.nvfp4", widened=True, growth=0.02, architecture=100,
    product="float4",
)  # fmt: skip
QUANTIZATIONS = {row.name: row for row in (INT4, INT8, INT8_QDQ, FP8_QDQ, INT4_AWQ, NVFP4)}
"""By name."""


@dataclass(frozen=True, kw_only=True)
class CacheRounding:
    """A way to keep keys and values: as integers, in steps that each channel of a head has for itself."""

    name: str
    """As `--cache` and the manifest have it."""
    element: str
    """What they are in ONNX Runtime, as ONNX calls it: those of which `largest` is the largest."""
    largest: int
    bits: int
    onnxruntime: tuple[int, int]
    """The first that has them on the CPU."""
    openvino: str
    """What they are there, as OpenVINO calls it, which finds the steps of each token by itself."""
    growth: float
    """How much of itself a text's perplexity may grow by."""
    beside: int = 8
    """Bytes that a runtime may store with a token's numbers of one head: their step, and which of them is zero."""
    apart: float = 0.1
    """As `Dtype.apart`: what rounding does where weights are random."""


CACHES = {row.name: row for row in (
    CacheRounding(name="int8", element="INT8", largest=127, bits=8, onnxruntime=(1, 27), openvino="u8", growth=0.001),
)}  # fmt: skip
"""By name."""
EXACT_CACHE = "float"
"""What `--cache` calls keys and values that are not rounded."""


def in_blocks() -> list[Quantization]:
    """The rows that round weights in blocks."""
    return [row for row in QUANTIZATIONS.values() if row.block]


def calibrated() -> list[Quantization]:
    """The rows that Model Optimizer calibrates."""
    return [row for row in QUANTIZATIONS.values() if row.calibrated]
