"""PyTorch, eager: what everything else is compared with."""

import copy
from typing import Self

import torch

from fope_export.backends.base import Feeds, Logits
from fope_export.model.decoder import Cache, Decoder


def in_numpy(tensor: torch.Tensor) -> Logits:
    """The values on the host; half types as float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()


class EagerBackend:
    """A decoder in PyTorch, in the dtype its weights have and where they are."""

    def __init__(self, model: Decoder, *, name: str = "torch") -> None:
        self.name, self.model = name, model
        self.vocab_size = model.config.vocab_size

    @classmethod
    def in_float64(cls, model: Decoder) -> Self:
        """The truth: a copy of `model` that computes everything but the angles in float64."""
        return cls(copy.deepcopy(model).double(), name="torch float64")

    def empty_cache(self, batch: int) -> Cache:
        return self.model.empty_cache(batch)

    @torch.inference_mode()
    def step(self, feeds: Feeds, cache: Cache) -> tuple[Logits, Cache]:
        inputs = (torch.from_numpy(array).to(self.model.embed.weight.device) for array in feeds)
        logits, present = self.model(*inputs, cache)
        return in_numpy(logits), present
