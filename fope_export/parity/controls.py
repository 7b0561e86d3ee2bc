"""Negative controls: models that are wrong in ways a FoPE export can be wrong. The rule must refuse each of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from fope_export.backends.base import Backend, Feeds, Logits
from fope_export.backends.eager import EagerBackend
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.model.decoder import Cache, Decoder


@dataclass(frozen=True)
class Control:
    """One deliberate mistake. `reason` says why a model cannot show it, or nothing."""

    name: str
    reason: Callable[[Decoder], str]
    rotary: Callable[[FopeRotary], FopeRotary] = lambda rotary: rotary
    backend: Callable[[Decoder], Backend] = EagerBackend

    @contextmanager
    def applied(self, model: Decoder) -> Iterator[Backend]:
        """A backend that makes the mistake; `model` is whole again afterwards."""
        attentions = model.attentions()
        right = [attention.rotary for attention in attentions]
        try:
            for attention in attentions:
                attention.rotary = self.rotary(attention.rotary)
            yield self.backend(model)
        finally:
            for attention, rotary in zip(attentions, right, strict=True):
                attention.rotary = rotary


def _other_pad(rotary: FopeRotary) -> FopeRotary:
    spectrum = rotary.spectrum
    config = msgspec.structs.replace(spectrum.config, sin_pad=spectrum.config.sin_pad + 1.0)
    return FopeRotary.from_spectrum(Spectrum(config, spectrum.freq, spectrum.sin_coef, spectrum.cos_coef))


def _swapped_heads(rotary: FopeRotary) -> FopeRotary:
    s = rotary.spectrum
    order = [1, 0, *range(2, s.config.groups)]
    return FopeRotary.from_spectrum(Spectrum(s.config, s.freq, s.sin_coef[order], s.cos_coef[order]))


class _HalfRotary(FopeRotary):
    """Tables and rotation in float16."""

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        q_rotated, k_rotated = super().forward(q.half(), k.half(), position_ids)
        return q_rotated.to(q.dtype), k_rotated.to(k.dtype)


def _half_precision(rotary: FopeRotary) -> FopeRotary:
    s = rotary.spectrum
    config = msgspec.structs.replace(s.config, full_precision=False)
    return _HalfRotary.from_spectrum(Spectrum(config, s.freq, s.sin_coef, s.cos_coef))


class _ShiftedBackend(EagerBackend):
    """Every token after a sequence's first stands one position too far."""

    def step(self, feeds: Feeds, cache: Cache) -> tuple[Logits, Cache]:
        shifted = feeds.position_ids + (np.cumsum(feeds.attention_mask, 1) > 1)[:, -feeds.position_ids.shape[1] :]
        return super().step(feeds._replace(position_ids=shifted), cache)


def _spectrum(model: Decoder) -> Spectrum:
    return model.attentions()[0].rotary.spectrum


def _unpadded(model: Decoder) -> str:
    spectrum = _spectrum(model)
    return "" if spectrum.config.pairs < spectrum.config.head_dim // 2 else "no pair is padded"


def _shared(model: Decoder) -> str:
    spectrum = _spectrum(model)
    same = all(np.array_equal(coef[:1], coef[1:2]) for coef in (spectrum.sin_coef, spectrum.cos_coef))
    return "heads have the same coefficients" if spectrum.config.groups == 1 or same else ""


def _without_position(model: Decoder) -> str:
    return "" if _spectrum(model).config.pairs else "the model has no position embedding"


def _in_half_already(model: Decoder) -> str:
    half = model.embed.weight.dtype.itemsize < torch.float32.itemsize
    return "the model itself is in half precision" if half else _without_position(model)


CONTROLS = (
    Control("sine of the padding changed", _unpadded, rotary=_other_pad),
    Control("coefficients of two heads swapped", _shared, rotary=_swapped_heads),
    Control("positions shifted by one", _without_position, backend=_ShiftedBackend),
    Control("rotation in half precision", _in_half_already, rotary=_half_precision),
)
