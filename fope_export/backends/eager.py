"""PyTorch, eager: what everything else is compared with."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fope_export.backends.base import CHUNK, Feeds, Logits, Slots, for_decoder
from fope_export.backends.stacked import Part, StackedSlots, fill, widest
from fope_export.model.decoder import Cache, Decoder


def in_numpy(tensor: torch.Tensor) -> Logits:
    """The values on the host; half types as float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()


class EagerBackend:
    """A decoder in PyTorch, in the dtype its weights have and where they are."""

    chunk = CHUNK

    def __init__(self, model: Decoder, *, name: str = "torch") -> None:
        self.name, self.model = name, model
        self.vocab_size = model.config.vocab_size

    @classmethod
    def in_float64(cls, model: Decoder) -> Self:
        """The truth: a decoder on the weights of `model` that computes everything but the angles in float64."""
        return cls(model.computing(torch.float64), name="torch float64")

    def empty_cache(self, batch: int) -> Cache:
        return self.model.empty_cache(batch)

    @torch.inference_mode()
    def assemble(self, parts: Sequence[Part]) -> Cache:
        width = widest(parts)
        shape = list(parts[0].cache[0][0].shape)
        shape[0], shape[2] = len(parts), self.model.capacity or width
        new = parts[0].cache[0][0].new_zeros
        layers = zip(*(part.cache for part in parts), strict=True)
        return [tuple(fill(new(shape), side, parts, width) for side in zip(*layer, strict=True)) for layer in layers]

    @torch.inference_mode()
    def step(self, feeds: Feeds, cache: Cache, *, last: bool = False) -> tuple[Logits, Cache]:
        arrays = for_decoder(feeds, self.model.config.spectrum.axes)
        inputs = (torch.from_numpy(array).to(self.model.embed.weight.device) for array in arrays)
        with attention_for(cache[0][0]):
            logits, present = self.model(*inputs, cache, logits_to_keep=int(last))
        return in_numpy(logits), present

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:  # noqa: ARG002
        return StackedSlots(self, count, self.model.capacity or None, whole=whole)

    def close(self) -> None:
        """The model is the caller's."""


def attention_for(weight: torch.Tensor) -> AbstractContextManager[None]:
    """PyTorch's fused attention in half types packs keys for AVX-512 where the processor has it, and fails where
    ATEN_CPU_CAPABILITY takes it away: another is chosen then.
    """
    fails = weight.dtype.itemsize == 2 and weight.device.type == "cpu" and "ATEN_CPU_CAPABILITY" in os.environ
    return sdpa_kernel(SDPBackend.MATH) if fails else nullcontext()
