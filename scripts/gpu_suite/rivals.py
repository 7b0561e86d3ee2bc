"""What the kernel is measured against: the same rotation in torch, and a fused RoPE in Triton."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from gpu_suite.cases import Call, bases, join, rope, split

Outputs = tuple[Tensor, Tensor]


def eager(call: Call) -> Outputs:
    """The definition as one writes it in torch: angles, series and rotation in float32, one rounding at the end."""
    return _rotate(*call.arguments)


def compiled() -> Callable[[Call], Outputs]:
    """The same through torch.compile, for one shape: what it learnt of others is forgotten."""
    torch.compiler.reset()
    function = torch.compile(_rotate, dynamic=False, fullgraph=True)
    return lambda call: function(*call.arguments)


def _rotate(
    q: Tensor, k: Tensor, position_ids: Tensor, freq: Tensor, sin_coef: Tensor, cos_coef: Tensor,
    axis: Tensor | None,
    sin_pad: float, cos_pad: float, sign: float, interleaved: bool, rotary_dim: int,
) -> Outputs:  # fmt: skip
    groups, count, pairs = sin_coef.shape
    waves = bases(position_ids, freq, axis, count, torch.float32)
    tables = []
    for basis, (coef, pad) in zip(waves, ((sin_coef, sin_pad), (cos_coef, cos_pad)), strict=True):
        table = basis @ coef.transpose(0, 1).reshape(count, groups * pairs)
        missing = rotary_dim // 2 - pairs
        tables.append(torch.nn.functional.pad(table.unflatten(-1, (groups, pairs)), (0, missing), value=pad))
    sin, cos = (tables[0] * sign).unsqueeze(3), tables[1].unsqueeze(3)
    return _turn(q, sin, cos, groups, interleaved), _turn(k, sin, cos, groups, interleaved)


def _turn(x: Tensor, sin: Tensor, cos: Tensor, groups: int, interleaved: bool) -> Tensor:
    paired, rest = x.tensor_split((2 * sin.shape[-1],), dim=-1)
    left, right = split(paired.float(), groups, interleaved)
    rotated = join(left * cos - right * sin, right * cos + left * sin, interleaved).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def as_rope(call: Call) -> Call:
    """The same q, k and positions, turned by RoPE: what a model without FoPE would have to compute."""
    half = call.case.shape.E // 2
    shape = call.case.shape._replace(D=half, F=half, G=1)
    case = rope(shape, kind=call.case.kind, last=call.case.last)
    freq = (10_000.0 ** -(torch.arange(half, dtype=torch.float64, device=call.q.device) / half)).float()
    eye = torch.eye(half, device=call.q.device)[None]
    return replace(call, case=case, freq=freq, sin_coef=eye, cos_coef=eye)


def rope_tables(call: Call) -> Outputs:
    """Cosine and sine of every position that occurs, [positions, E / 2], in the model's type, as models keep them."""
    last = int(call.position_ids.max()) + 1
    angles = (torch.arange(last, device=call.q.device).float()[:, None] * call.freq).double()
    return angles.cos().to(call.case.dtype), angles.sin().to(call.case.dtype)


def triton_rope() -> ModuleType:
    """The module with the Triton kernel. Raises ImportError where Triton is missing."""
    from gpu_suite import triton_rope

    return triton_rope
