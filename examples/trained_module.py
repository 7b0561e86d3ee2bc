#!/usr/bin/env python
"""FoPE in a module of one's own, trained for a few steps, exported and compared: examples/trained_module.py OUT"""

import sys

import torch

import fope_export as fx


class Averages(torch.nn.Module):
    """Attention with FoPE, which is to give each token the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.rotary = fx.FopeRotary.create(head_dim=16, groups=2, training_length=32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, 32] to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k = self.rotary(q, k, torch.arange(x.shape[1]).expand(x.shape[0], -1))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def main(out: str) -> None:
    torch.manual_seed(0)
    model = Averages()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        x = torch.randn(8, 32, 32)
        wanted = x.cumsum(1) / torch.arange(1, 33)[:, None]
        loss = torch.nn.functional.mse_loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    bundle = fx.export_module(model.eval(), (torch.randn(2, 9, 32),), out, dynamic_shapes={"x": sizes})
    result = fx.validate_module(bundle, model)
    print(f"loss {loss.item():.3f}; the export {'computes' if result.passed else 'does NOT compute'} the same")


if __name__ == "__main__":
    main(*sys.argv[1:])
