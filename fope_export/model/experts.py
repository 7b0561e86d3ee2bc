"""Mixture of experts with exact routing, as plain products that every runtime has.

T tokens, N experts, k of them a token, G router groups, I inner width.
"""

import torch
from torch import Tensor, nn

from fope_export.config import ExpertsConfig

TINY = 1e-20
"""What the grouped router adds to the sum that it divides by (modeling_interns1_pro.py)."""


class Experts(nn.Module):
    """Every expert computes every token, and the weight of those that were not chosen is 0.

    The result is that of running the chosen ones alone; the work is that of running all N. No shape depends on the
    routing, so the graph has no loop and batches as it likes.
    """

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(hidden_size, config.count, bias=False)
        self.proj = nn.Parameter(torch.empty(config.count, 2 * config.intermediate_size, hidden_size))
        """Rows of gate and up in turn, which is how ONNX Runtime's operator reads them too."""
        self.out = nn.Parameter(torch.empty(config.count, hidden_size, config.intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden]."""
        tokens = x.flatten(0, 1)
        weights = self.route(tokens).to(x.dtype)
        projected = self.proj @ tokens.T
        gate, up = projected[:, ::2], projected[:, 1::2]  # [N, I, T] each
        inner = nn.functional.silu(gate) * up * weights.T[:, None]
        out: Tensor = (self.out @ inner).sum(0).T.reshape(x.shape)
        return out

    def route(self, tokens: Tensor) -> Tensor:
        """Weights [T, N] in float32 (or wider): 0 but for the k chosen, k / G of them from each group of N / G."""
        c = self.config
        logits = self.router(tokens)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        grouped = scores.unflatten(-1, (c.groups, -1))
        best, where = grouped.topk(c.per_token // c.groups, dim=-1)
        chosen = torch.zeros_like(grouped).scatter(-1, where, best).flatten(1)
        return chosen / (chosen.sum(-1, keepdim=True) + TINY) if c.normalize else chosen


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """[N, I, hidden] each -> rows in turn [N, 2 I, hidden], as `Experts.proj` has them."""
    return torch.stack((gate, up), dim=2).flatten(1, 2)
