"""Inputs of the rotation, its definition in float64, and the check that holds a kernel against it.

B batch, S sequence, H query heads, K key-value heads, E head_dim, D kept frequencies, F rotated pairs, G groups.

One ulp is the spacing of the output's type at the size of what is added: |left| * sum |cos * coef| + |right| * sum
|sin * coef|. A sum that cancels is thereby not asked for digits that its terms never had.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

ULPS = 4
GUARD = 4096  # elements on both sides of an output, as many as a token has; whole 16 bytes keep outputs aligned
SENTINEL = 7.0
CHUNK = 4096  # tokens that the definition holds in float64 at once
THETA = 10_000.0


class Kind(NamedTuple):
    """A type of the model: ONNX's number, torch's type, mantissa bits, smallest exponent of normal numbers."""

    onnx: int
    torch: torch.dtype
    mantissa: int
    smallest: int

    def spacing(self, at: Tensor) -> Tensor:
        exponent = torch.frexp(at.clamp(min=2.0**self.smallest)).exponent - 1
        return torch.exp2((exponent - self.mantissa).double())


KINDS = {
    "fp32": Kind(1, torch.float32, 23, -126),
    "fp16": Kind(10, torch.float16, 10, -14),
    "bf16": Kind(16, torch.bfloat16, 7, -126),
}


class Shape(NamedTuple):
    """In the contract's letters."""

    B: int
    S: int
    H: int
    K: int
    E: int
    D: int
    F: int
    G: int

    def __str__(self) -> str:
        return " ".join(f"{letter}{size}" for letter, size in zip(self._fields, self, strict=True))


@dataclass(frozen=True)
class Case:
    """One rotation to make inputs for."""

    shape: Shape
    kind: str = "fp16"
    mixing: bool = True  # FoPE's coefficients; otherwise the identity, which is RoPE
    interleaved: bool = False
    sign: float = 1.0
    sin_pad: float = 1.0
    cos_pad: float = 1.0
    last: int | None = 1_000_000  # positions are drawn up to it; None counts from 0 in every row
    shift: int = 0  # elements between an aligned address and the outputs
    rotary_dim: int | None = None  # channels of a head that form pairs; None is all
    axes: int = 1  # of positions; frequencies take them by turns
    bases: int = 1  # that each series is a mixture of
    whole: bool = True  # positions, or float32 between the whole ones

    @property
    def general(self) -> bool:
        """Whether only the general version computes it."""
        return self.axes > 1 or self.bases > 1 or not self.whole

    @property
    def rotary(self) -> int:
        return self.shape.E if self.rotary_dim is None else self.rotary_dim

    @property
    def dtype(self) -> torch.dtype:
        return KINDS[self.kind].torch

    def __str__(self) -> str:
        pairing = "interleaved" if self.interleaved else "half"
        pads = f"pads {self.sin_pad:g} {self.cos_pad:g}"
        last = "counted" if self.last is None else f"to {self.last}"
        kind = "fope" if self.mixing else "rope"
        turning = f"R{self.rotary} {pairing} sign {self.sign:g} {pads}"
        if self.general:
            turning += f" axes {self.axes} bases {self.bases} {'whole' if self.whole else 'float'}"
        return f"{self.kind} {kind} {self.shape} {turning} {last} shift {self.shift}"


def rope(shape: Shape, **fields: object) -> Case:
    """Every pair turns with its own frequency; none at all where D and F are 0 (NoPE)."""
    return Case(shape, mixing=False, sin_pad=0.0, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Call:
    """A case with its tensors, in the order and shapes of the contract's inputs."""

    case: Case
    q: Tensor
    k: Tensor
    position_ids: Tensor
    freq: Tensor
    sin_coef: Tensor
    cos_coef: Tensor
    axis: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the operator takes, in the contract's order, without the precision of the rotation."""
        case, tensors = self.case, (self.q, self.k, self.position_ids, self.freq, self.sin_coef, self.cos_coef)
        return *tensors, self.axis, case.sin_pad, case.cos_pad, case.sign, case.interleaved, case.rotary

    def tokens(self, size: int) -> Iterator[slice]:
        """Pieces of S that keep B * S at about `size`."""
        step = max(1, size // self.case.shape.B)
        return (slice(start, start + step) for start in range(0, self.case.shape.S, step))


def positions(case: Case, device: torch.device) -> Tensor:
    """[B, S], or [A, B, S] with several axes: int64, ascending or drawn; drawn ones hold 0 and the last. Or float32,
    between -1000 and 1000.
    """
    size = (*([case.axes] if case.axes > 1 else []), case.shape.B, case.shape.S)
    if not case.whole:
        return 2000 * torch.rand(size, generator=torch.Generator(device).manual_seed(5), device=device) - 1000
    if case.last is None:
        return torch.arange(size[-1], device=device).expand(size).contiguous()
    generator = torch.Generator(device).manual_seed(5)
    drawn = torch.randint(0, case.last + 1, size, generator=generator, device=device)
    drawn.view(-1)[0], drawn.view(-1)[-1] = 0, case.last
    return drawn


def make(case: Case, device: torch.device) -> Call:
    """Normal q and k, RoPE's frequencies, coefficients near the identity."""
    B, S, H, K, E, D, F, G = case.shape  # noqa: N806
    generator = torch.Generator(device).manual_seed(4)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    freq = (THETA ** -(torch.arange(D, dtype=torch.float64, device=device) / (E / 2))).float()
    eye = torch.eye(D, F, device=device).expand(G, D, F)
    sin_coef, cos_coef = (eye + 0.3 * normal(G, D, F) if case.mixing else eye.contiguous() for _ in range(2))
    q, k = (normal(B, S, heads, E, dtype=case.dtype) for heads in (H, K))
    if case.bases > 1:
        sin_coef, cos_coef = (
            torch.cat(both, dim=1) for both in ((sin_coef, 0.3 * normal(G, D, F)), (0.3 * normal(G, D, F), cos_coef))
        )
    axis = torch.arange(D, device=device) % case.axes if case.axes > 1 else None
    return Call(case, q, k, positions(case, device), freq, sin_coef, cos_coef, axis)


def split(x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both channels of every pair of x [B, S, H, R], each [B, S, G, H / G, R / 2]."""
    grouped = x.unflatten(2, (groups, -1))
    if interleaved:
        return grouped[..., 0::2], grouped[..., 1::2]
    left, right = grouped.chunk(2, dim=-1)
    return left, right


def join(left: Tensor, right: Tensor, interleaved: bool) -> Tensor:
    pairs = torch.stack((left, right), dim=-1).flatten(-2) if interleaved else torch.cat((left, right), dim=-1)
    return pairs.flatten(2, 3)


def bases(
    position_ids: Tensor, freq: Tensor, axis: Tensor | None, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What sine and cosine are mixtures of, each [B, S, J], J being the rows of coefficients: one basis or both. The
    angle is by definition the rounded float32 product.
    """
    places = position_ids.float()
    each = places[..., None] if axis is None else places[axis].permute(1, 2, 0)
    angles = (each * freq).to(dtype)
    sines, cosines = angles.sin(), angles.cos()
    if rows == len(freq):
        return sines, cosines
    both = torch.cat((sines, cosines), dim=-1)
    return both, both


def series(call: Call, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S, C, and the sums of their terms' sizes, each [B, S, G, 1, R / 2] in float64."""
    case = call.case
    waves = bases(position_ids, call.freq, call.axis, call.sin_coef.shape[1], torch.float64)
    coefs = (call.sin_coef.double(), case.sin_pad), (call.cos_coef.double(), case.cos_pad)
    sums = []
    for basis, (coef, pad) in zip(waves, coefs, strict=True):
        for terms, factors, rest in ((basis, coef, pad), (basis.abs(), coef.abs(), abs(pad))):
            table = torch.einsum("bsd,gdf->bsgf", terms, factors)
            missing = case.rotary // 2 - case.shape.F
            sums.append(torch.nn.functional.pad(table, (0, missing), value=rest).unsqueeze(3))
    sin, sin_size, cos, cos_size = sums
    return sin, cos, sin_size, cos_size


def define(call: Call, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, S, H, E] rotated in float64, and the size of what was added for each element."""
    case = call.case
    sin, cos, sin_size, cos_size = series(call, position_ids)
    paired, rest = x.double().tensor_split((case.rotary,), dim=-1)
    left, right = split(paired, case.shape.G, case.interleaved)
    sin = sin * case.sign
    rotated = join(left * cos - right * sin, right * cos + left * sin, case.interleaved)
    left, right = left.abs(), right.abs()
    size = join(left * cos_size + right * sin_size, right * cos_size + left * sin_size, case.interleaved)
    return torch.cat((rotated, rest), dim=-1), torch.cat((size, rest.abs()), dim=-1)


def worst(call: Call, outputs: tuple[Tensor, Tensor]) -> float:
    """The largest error in ulps; NaN where there is one."""
    errors = []
    for part in call.tokens(CHUNK):
        for x, got in zip((call.q, call.k), outputs, strict=True):
            wanted, size = define(call, x[:, part], call.position_ids[..., part])
            ulp = KINDS[call.case.kind].spacing(size)
            errors.append(((got[:, part].double() - wanted).abs() / ulp).max())
    return float(torch.stack(errors).max())


class Fenced:
    """An output that starts as NaN, `shift` elements after an aligned address, between sentinels."""

    def __init__(self, like: Tensor, shift: int) -> None:
        self._start, self._end = GUARD + shift, GUARD + shift + like.numel()
        self._memory = torch.full((self._end + GUARD,), SENTINEL, dtype=like.dtype, device=like.device)
        self.value = self._memory[self._start : self._end].view(like.shape)
        self.value.fill_(math.nan)

    def fault(self) -> str:
        if not bool((self._memory[: self._start] == SENTINEL).all() and (self._memory[self._end :] == SENTINEL).all()):
            return "wrote outside its output"
        return "" if all(bool(part.isfinite().all()) for part in self.value.unbind(0)) else "left NaN in its output"


Launch = Callable[[Call, Tensor, Tensor], None]
"""Writes the rotation of a call into q_rotated and k_rotated. Raises RuntimeError with the library's code."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    ulps: float | None
    fault: str

    def record(self) -> dict[str, object]:
        return {"name": self.name, "ulps": self.ulps, "fault": self.fault}


def judge(name: str, call: Call, outputs: tuple[Tensor, Tensor], bound: float = ULPS) -> Finding:
    """Hold outputs against the definition. No fault means that every element is within `bound` ulps."""
    ulps = worst(call, outputs)
    if not math.isfinite(ulps):
        return Finding(name, None, "not finite")
    return Finding(name, round(ulps, 3), "" if ulps <= bound else f"{ulps:.4g} ulps, at most {bound} are allowed")


def check(launch: Launch, call: Call, given: Call | None = None, name: str = "") -> Finding:
    """Launch `given` (a wrong call, where a check of the check is wanted) and hold the result against `call`."""
    name = name or str(call.case)
    try:
        outputs = Fenced(call.q, call.case.shift), Fenced(call.k, call.case.shift)
        launch(given or call, outputs[0].value, outputs[1].value)
        for which, output in zip(("q", "k"), outputs, strict=True):
            if fault := output.fault():
                return Finding(name, None, f"{which}: {fault}")
        return judge(name, call, (outputs[0].value, outputs[1].value))
    except Exception as error:  # of a rival's compiler too: whatever it is, the check has failed
        return Finding(name, None, f"{type(error).__name__}: {error}"[:500])


def _with(call: Call, **fields: object) -> Call:
    return replace(call, case=replace(call.case, **fields))  # type: ignore[arg-type]


CONTROLS: dict[str, Callable[[Call], Call]] = {
    "positions shifted by one": lambda call: replace(call, position_ids=call.position_ids + 1),
    "sign flipped": lambda call: _with(call, sign=-call.case.sign),
    "the other pairing": lambda call: _with(call, interleaved=not call.case.interleaved),
    "sine and cosine exchanged": lambda call: replace(call, sin_coef=call.cos_coef, cos_coef=call.sin_coef),
    "another sine pad": lambda call: _with(call, sin_pad=call.case.sin_pad + 0.125),
    "groups reversed": lambda call: replace(call, sin_coef=call.sin_coef.flip(0).contiguous()),
}
"""Wrong calls. A check that lets one pass proves nothing."""


def _one_basis(call: Call) -> Call:
    count, sin_coef = len(call.freq), call.sin_coef.clone()
    sin_coef[:, count:] = 0
    return replace(call, sin_coef=sin_coef)


GENERAL_CONTROLS: dict[str, Callable[[Call], Call]] = {
    "axes swapped": lambda call: replace(call, position_ids=call.position_ids.flip(0).contiguous()),
    "phases dropped": _one_basis,
    "positions rounded": lambda call: replace(call, position_ids=call.position_ids.round()),
}
"""The same of what only the general version computes."""
CONTROLLED = Shape(2, 63, 12, 6, 48, 11, 19, 3)
ODD = (
    Shape(1, 1, 1, 1, 2, 1, 1, 1),
    Shape(2, 7, 6, 3, 48, 5, 4, 3),
    Shape(1, 63, 12, 6, 32, 7, 8, 3),
    Shape(3, 1000, 6, 2, 80, 9, 19, 1),
    Shape(3, 5, 5, 5, 64, 17, 16, 5),
    Shape(1, 11, 4, 2, 30, 11, 7, 2),
    Shape(1, 9, 4, 2, 72, 3, 36, 2),
    Shape(1, 4, 37, 37, 16, 3, 3, 37),
    Shape(1, 2501, 2, 1, 16, 3, 4, 1),
    Shape(1, 9, 1, 1, 1600, 900, 700, 1),
)
REAL = (
    Shape(1, 1000, 16, 16, 64, 16, 16, 16),
    Shape(2, 512, 32, 8, 128, 31, 31, 8),
    Shape(64, 1, 32, 8, 128, 36, 32, 8),
    Shape(1, 1, 32, 4, 128, 31, 31, 4),
)
SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"sign": -1.0, "sin_pad": 0.25, "cos_pad": -3.0},
    {"sin_pad": 0.0},
)
GENERAL = ((3, 1, True), (1, 2, True), (1, 1, False), (2, 2, False))
"""Axes, bases, and whether positions are whole."""
LONG = Case(Shape(1, 32_768, 32, 8, 128, 31, 31, 8))
BEYOND_32_BITS = Case(Shape(1, 530_000, 32, 4, 128, 31, 31, 4))  # q has more than 2 ** 31 elements


def cases(*, quick: bool) -> list[Case]:
    """Everything small. Odd shapes in every type, pairing and setting; real ones; RoPE and NoPE; unaligned outputs."""
    kinds, pairings = ("fp16",) if quick else tuple(KINDS), (False, True)
    odd = [
        Case(shape, kind, interleaved=interleaved, **settings)  # type: ignore[arg-type]
        for shape, kind, interleaved, settings in product(ODD, kinds, pairings, SETTINGS)
    ]
    real = [Case(shape, kind) for shape, kind in product(REAL, KINDS)]
    plain = [
        rope(shape, kind=kind, interleaved=interleaved)
        for shape, kind, interleaved in product((Shape(2, 63, 4, 2, 64, 32, 32, 1), Shape(2, 7, 4, 2, 48, 0, 0, 1)),
                                                KINDS, pairings)
    ]  # fmt: skip
    unaligned = [Case(shape, kind, shift=1) for shape, kind in product((ODD[1], REAL[0]), KINDS)]
    partial = [
        Case(shape, kind, rotary_dim=rotary_dim, interleaved=interleaved)
        for (shape, rotary_dim), kind, interleaved in product(
            ((REAL[0], 32), (REAL[1], 64), (REAL[3], 62), (ODD[1], 10)), kinds, pairings
        )
    ]
    general = [
        Case(shape, kind, axes=axes, bases=count, whole=whole, sign=-1.0, interleaved=whole)
        for shape, kind, (axes, count, whole) in product((*ODD[1:4], *REAL[1:]), kinds, GENERAL)
    ]
    return [*odd, *real, *plain, *unaligned, *partial, *general]
