"""A module that is no model: a layer around the rotation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from fope_export.fope.rotary import FopeRotary


class Pair(nn.Module):
    """A learnable, normalized rotation on two axes, used twice; several outputs by name; a mask and token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.rotary = FopeRotary.create(
            head_dim=16, groups=2, training_length=64, learnable=True, normalize=True, init="eye"
        )

    def forward(self, ids: Tensor, mask: Tensor, *, where: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids).unflatten(-1, (4, 16))
        q, k = self.rotary(x, x[:, :, :2], where)
        q, k = self.rotary(q, k, where.flip(1))
        q, k = q.transpose(1, 2), k.repeat_interleave(2, 2).transpose(1, 2)
        scores = (q @ k.mT).masked_fill(~mask[:, None, None], -1e4)
        return {"attention": scores.softmax(-1), "mean": q.mean((1, 2))}


def pair_inputs(batch: int = 2, length: int = 5) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return {"where": torch.arange(length).expand(batch, -1), "ids": torch.randint(50, (batch, length)), "mask": mask}


def tokens() -> dict[str, dict[int, Any]]:
    return {name: {0: Dim("batch"), 1: Dim("length", max=15)} for name in ("ids", "mask", "where")}


class Masked(nn.Module):
    """PyTorch's attention under a mask of padding, one row for all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = FopeRotary.create(head_dim=16, groups=2, training_length=64)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 16))
        q, k = self.rotary(heads, heads, positions)
        q, k, v = (each.transpose(1, 2) for each in (q, k, heads))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
