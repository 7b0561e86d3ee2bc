"""Calls of the kernel on the CPU: inputs, fenced outputs, the error in ulps, and what is refused."""

import ctypes
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gpu_suite.cases import Shape
from gpu_suite.library import Arguments, GeneralArguments

from fope_export.fope import reference
from fope_export.fope.spectrum import Spectrum
from fope_export.tensorrt import compile as compiling
from tests.support import magnitude

ULPS = 4
GUARD = 64  # elements on both sides of an output; a multiple of 16 bytes, so that outputs stay aligned
SENTINEL = 7.0
POINTER, SHAPE, DTYPE, SIZE, PLAN = range(-1, -6, -1)


class Kind(NamedTuple):
    """A type of the model: ONNX's number, mantissa bits, smallest exponent of normal numbers."""

    onnx: int
    numpy: Any
    mantissa: int
    smallest: int

    def spacing(self, at: np.ndarray) -> np.ndarray:
        exponent = np.frexp(at)[1] - 1
        spacing: np.ndarray = np.ldexp(1.0, np.maximum(exponent, self.smallest) - self.mantissa)
        return spacing


KINDS = {
    "fp32": Kind(1, np.dtype(np.float32), 23, -126),
    "fp16": Kind(10, np.dtype(np.float16), 10, -14),
    "bf16": Kind(16, np.dtype(ml_dtypes.bfloat16), 7, -126),
}


SHAPES = {
    "one-pair": Shape(1, 1, 1, 1, 2, 1, 1, 1),
    "gqa": Shape(2, 7, 6, 3, 48, 5, 4, 3),
    "two-key-heads-a-group": Shape(1, 6, 12, 6, 32, 7, 8, 3),
    "shared": Shape(1, 13, 6, 2, 80, 9, 19, 1),
    "mha": Shape(3, 5, 5, 5, 64, 17, 16, 5),
    "odd-half": Shape(1, 11, 4, 2, 30, 11, 7, 2),
    "no-vector-of-8": Shape(1, 9, 4, 2, 72, 3, 36, 2),
    "19-padded": Shape(2, 3, 6, 2, 128, 45, 45, 2),
    "many-groups": Shape(1, 4, 37, 37, 16, 3, 3, 37),
    "long": Shape(1, 2500, 2, 1, 16, 3, 4, 1),
    "wide-basis": Shape(1, 9, 1, 1, 1600, 900, 700, 1),
}


@dataclass(frozen=True)
class Call:
    """Inputs of one rotation, in the type they are computed in."""

    spectrum: Spectrum
    kind: Kind
    q: np.ndarray
    k: np.ndarray
    position_ids: np.ndarray

    @property
    def general(self) -> bool:
        """Whether only the general version takes it."""
        c = self.spectrum.config
        return c.axes > 1 or c.bases > 1 or self.position_ids.dtype != np.int64


def spectrum(shape: Shape, **fields: Any) -> Spectrum:
    """With coefficients near the identity, those of another basis near 0; where there are axes, they take turns."""
    if fields.get("axes", 1) > 1:
        fields = {"axis": tuple(d % fields["axes"] for d in range(shape.D))} | fields
    rng = np.random.default_rng(3)
    freq = np.sort(rng.uniform(1e-3, 1, shape.D).astype(np.float32))[::-1].copy()
    sin_coef, cos_coef = (
        (np.eye(shape.D, shape.F) + 0.3 * rng.standard_normal((shape.G, shape.D, shape.F))).astype(np.float32)
        for _ in range(2)
    )
    if fields.get("bases", 1) > 1:
        more = (0.3 * rng.standard_normal((2, *sin_coef.shape))).astype(np.float32)
        sin_coef, cos_coef = np.concatenate((sin_coef, more[0]), axis=1), np.concatenate((more[1], cos_coef), axis=1)
    return Spectrum.fope(freq, sin_coef, cos_coef, shape.E, **fields)


def make(shape: Shape, kind: Kind, numbers: Spectrum, *, whole: bool = True) -> Call:
    """At positions [B, S], or [A, B, S] where the spectrum has several axes."""
    rng = np.random.default_rng(4)
    axes = (numbers.config.axes,) if numbers.config.axes > 1 else ()
    position_ids = rng.integers(0, 1_000_001, (*axes, shape.B, shape.S))
    position_ids.flat[0], position_ids.flat[-1] = 0, 1_000_000
    if not whole:
        position_ids = rng.uniform(-1000, 1000, position_ids.shape).astype(np.float32)
    sizes = (shape.B, shape.S, shape.H, shape.E), (shape.B, shape.S, shape.K, shape.E)
    q, k = (rng.standard_normal(size).astype(kind.numpy) for size in sizes)
    return Call(numbers, kind, q, k, position_ids)


class Fenced:
    """An output that starts as NaN, `shift` elements after an aligned address, between sentinels."""

    def __init__(self, like: np.ndarray, shift: int = 0) -> None:
        self._memory = np.full(like.size + 2 * GUARD + shift, SENTINEL, like.dtype)
        self._start = GUARD + shift
        self.value = self._memory[self._start : self._start + like.size].reshape(like.shape)
        self.value[...] = np.nan

    def check(self) -> None:
        end = self._start + self.value.size
        assert (self._memory[: self._start] == SENTINEL).all() and (self._memory[end:] == SENTINEL).all()
        assert np.isfinite(self.value.astype(np.float32)).all()


ONNX = {"float32": 1, "int64": 7}
"""Numbers of positions' types."""


def arguments(call: Call, outputs: tuple[Fenced, Fenced], *, general: bool = False) -> Arguments:
    numbers, c = call.spectrum, call.spectrum.config
    tensors = (call.q, call.k, call.position_ids, numbers.freq, numbers.sin_coef, numbers.cos_coef)
    addresses = [t.ctypes.data for t in (*tensors, *(output.value for output in outputs))]
    plain = (
        *addresses, call.q.shape[0] * call.q.shape[1], call.q.shape[2], call.k.shape[2], c.head_dim, c.rotary_dim,
        c.frequencies, c.pairs, c.groups, c.pairing == "interleaved", call.kind.onnx, c.sin_pad, c.cos_pad, c.sign,
    )  # fmt: skip
    if not general:
        return Arguments(*plain)
    axis = np.array(c.axis or [0] * c.frequencies, np.int64)
    made = GeneralArguments(
        *plain, call.position_ids.ctypes.data, axis.ctypes.data, c.rows, ONNX[call.position_ids.dtype.name]
    )
    made.position_ids, made.kept = None, axis  # the memory lives as long as the arguments
    return made


def run(library: ctypes.CDLL, call: Call, *plan: int, shift: int = 0) -> list[np.ndarray]:
    outputs = Fenced(call.q, shift), Fenced(call.k, shift)
    function = library.fope_rotary_host_general if call.general else library.fope_rotary_host
    assert function(ctypes.byref(arguments(call, outputs, general=call.general)), *plan) == 0
    for output in outputs:
        output.check()
    return [output.value for output in outputs]


def worst(call: Call, outputs: list[np.ndarray]) -> float:
    """The largest error in ulps."""
    errors = []
    for x, got in zip((call.q, call.k), outputs, strict=True):
        wanted = reference.rotate(call.spectrum, x, call.position_ids)
        ulp = call.kind.spacing(magnitude(call.spectrum, x, call.position_ids))
        errors.append((abs(got.astype(np.float64) - wanted) / ulp).max())
    return float(max(errors))


def plans(call: Call) -> Iterator[tuple[int, int, int]]:
    """Tokens a block, pairs an access, threads a block: every one that the GPU could take."""
    c = call.spectrum.config
    for tile, threads in product((1, 4, 8), (32, 128, 256)):
        yield tile, 1, threads
        widest = (4 if tile == 1 else 16) // call.kind.numpy.itemsize
        if widest > 1 and c.head_dim // 2 % widest == c.rotary_dim // 2 % widest == 0:
            yield tile, widest, threads


REFUSALS: dict[str, tuple[dict[str, Any], int]] = {
    "no q": ({"q": None}, POINTER),
    "no output": ({"k_rotated": None}, POINTER),
    "no positions": ({"position_ids": None}, POINTER),
    "no frequencies": ({"freq": None}, POINTER),
    "no coefficients": ({"cos_coef": None}, POINTER),
    "double": ({"dtype": 11}, DTYPE),
    "odd head_dim": ({"head_dim": 47}, SHAPE),
    "no head_dim": ({"head_dim": 0}, SHAPE),
    "too many pairs": ({"pairs": 25}, SHAPE),
    "odd rotary_dim": ({"rotary_dim": 47}, SHAPE),
    "no rotary_dim": ({"rotary_dim": 0}, SHAPE),
    "rotary_dim beyond the head": ({"rotary_dim": 50}, SHAPE),
    "more pairs than rotary_dim": ({"rotary_dim": 6}, SHAPE),
    "heads not in groups": ({"heads": 5}, SHAPE),
    "key heads not in groups": ({"kv_heads": 4}, SHAPE),
    "no groups": ({"groups": 0}, SHAPE),
    "negative tokens": ({"tokens": -1}, SHAPE),
    "more basis than shared memory": ({"frequencies": 7000}, SIZE),
    "more pairs than shared memory": ({"head_dim": 2**23, "rotary_dim": 2**23, "pairs": 2**22, "frequencies": 1}, SIZE),
    "more channels than a block counts": ({"heads": 3 * 2**22}, SIZE),
    "more heads than are divided by": ({"heads": 2**20, "kv_heads": 2**20, "groups": 1}, SIZE),
    "more tokens than a grid": ({"tokens": 2**40}, SIZE),
}


GENERAL_REFUSALS: dict[str, tuple[dict[str, Any], int]] = {
    **{name: refusal for name, refusal in REFUSALS.items() if name != "no positions"},
    "no positions": ({"positions": None}, POINTER),
    "no axis": ({"axis": None}, POINTER),
    "rows of neither basis": ({"rows": 7}, SHAPE),
    "rows of three": ({"rows": 15}, SHAPE),
    "half positions": ({"position_type": 10}, DTYPE),
    "more basis than shared memory": ({"frequencies": 7000, "rows": 7000}, SIZE),
    "more pairs than shared memory": (
        {"head_dim": 2**23, "rotary_dim": 2**23, "pairs": 2**22, "frequencies": 1, "rows": 1}, SIZE,
    ),
}  # fmt: skip


def code_of(function: Any, changes: dict[str, Any], *plan: Any, general: bool = False) -> int:
    """What `function` returns for a good call with `changes`; the outputs stay untouched."""
    numbers = spectrum(SHAPES["gqa"], **({"axes": 3, "bases": 2} if general else {}))
    call = make(SHAPES["gqa"], KINDS["fp16"], numbers)
    outputs = Fenced(call.q), Fenced(call.k)
    spoilt = arguments(call, outputs, general=general)
    for name, value in changes.items():
        setattr(spoilt, name, value)
    code: int = function(ctypes.byref(spoilt), *plan)
    assert all(np.isnan(output.value.astype(np.float32)).all() for output in outputs)
    return code


def mutated(folder: Path, old: str, new: str) -> Path:
    """The sources with one thing changed in the kernel."""
    sources = Path(shutil.copytree(compiling.SOURCES, folder / "sources"))
    text = (sources / "rotary.cuh").read_text()
    assert text.count(old) == 1
    (sources / "rotary.cuh").write_text(text.replace(old, new))
    return sources
