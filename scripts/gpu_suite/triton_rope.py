"""RoPE in one launch for q and k, in Triton: the measure of what a rotation may cost.

Tables are computed beforehand and shared by all heads and layers, which FoPE's cannot be. A program turns a few heads
of one token; pairs are (i, i + E/2), in float32, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = ((4, 1), (8, 1), (8, 2), (16, 4), (32, 4))
"""Heads a program, warps a program; the fastest is the rival."""


@triton.jit
def _turn(
    x_ptr, out_ptr, token, first, heads, cos, sin, half: tl.constexpr, size: tl.constexpr, lanes: tl.constexpr
):  # fmt: skip
    head = first + tl.arange(0, size)[:, None]
    lane = tl.arange(0, lanes)[None, :]
    there = (head < heads) & (lane < half)
    low = (token * heads + head) * (2 * half) + lane
    left = tl.load(x_ptr + low, mask=there).to(tl.float32)
    right = tl.load(x_ptr + low + half, mask=there).to(tl.float32)
    tl.store(out_ptr + low, (left * cos - right * sin).to(out_ptr.dtype.element_ty), mask=there)
    tl.store(out_ptr + low + half, (right * cos + left * sin).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _rope(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, position_ptr, cos_ptr, sin_ptr, heads, kv_heads,
    half: tl.constexpr, size: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    lane = tl.arange(0, lanes)[None, :]
    row = tl.load(position_ptr + token) * half
    cos = tl.load(cos_ptr + row + lane, mask=lane < half).to(tl.float32)
    sin = tl.load(sin_ptr + row + lane, mask=lane < half).to(tl.float32)
    q_blocks = tl.cdiv(heads, size)
    if block < q_blocks:
        _turn(q_ptr, q_out_ptr, token, block * size, heads, cos, sin, half, size, lanes)
    else:
        _turn(k_ptr, k_out_ptr, token, (block - q_blocks) * size, kv_heads, cos, sin, half, size, lanes)


def rotate(
    q: Tensor, k: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor,
    block: int, warps: int,
) -> None:  # fmt: skip
    """q [B, S, H, E] and k [B, S, K, E] at position_ids [B, S]; cos and sin [positions, E / 2]."""
    heads, kv_heads, half = q.shape[2], k.shape[2], q.shape[3] // 2
    grid = (position_ids.numel(), -(-heads // block) + -(-kv_heads // block))
    _rope[grid](
        q, k, q_out, k_out, position_ids, cos, sin, heads, kv_heads,
        half=half, size=block, lanes=triton.next_power_of_2(half), num_warps=warps,
    )  # fmt: skip


def available() -> bool:
    """Whether Triton can run here: on a GPU, or in its interpreter."""
    return torch.cuda.is_available() or bool(triton.knobs.runtime.interpret)
