"""Negative controls: models that are wrong in ways a FoPE export can be wrong. The rule must refuse each of them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from fope_export.backends.base import Backend
from fope_export.backends.eager import EagerBackend
from fope_export.fope.folding import scale_of
from fope_export.fope.replace import places, rotaries
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.model.decoder import Decoder


@dataclass(frozen=True)
class Control:
    """One deliberate mistake. `reason` says why a model cannot show it, or nothing; `rotary` makes it in a rotation."""

    name: str
    reason: Callable[[nn.Module], str]
    rotary: Callable[[FopeRotary], FopeRotary] = lambda rotary: rotary

    @contextmanager
    def made(self, model: nn.Module) -> Iterator[None]:
        """Every rotation inside `model` makes the mistake; the model is whole again afterwards."""
        rotations = places(model, lambda part: isinstance(part, FopeRotary))
        try:
            for parent, name, right in rotations:
                assert isinstance(right, FopeRotary)
                parent.register_module(name, self.rotary(right))
            yield
        finally:
            for parent, name, right in rotations:
                parent.register_module(name, right)

    @contextmanager
    def applied(self, model: Decoder) -> Iterator[Backend]:
        """A backend that makes the mistake."""
        with self.made(model):
            yield EagerBackend(model)


class _HalfRotary(FopeRotary):
    """Tables and rotation in float16."""

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        q_rotated, k_rotated = super().forward(q.half(), k.half(), position_ids)
        return q_rotated.to(q.dtype), k_rotated.to(k.dtype)


class _UnscaledRotary(FopeRotary):
    """The padding's scale is in no projection."""

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rotary_dim, scale = self.config.rotary_dim, scale_of(self.config)
        for x in (turned := super().forward(q, k, position_ids)):
            x[..., rotary_dim:] /= scale
        return turned


class _ShiftedRotary(FopeRotary):
    """Every token after a sequence's first stands one position too far."""

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        later = position_ids > position_ids.amin(dim=-1, keepdim=True)
        return super().forward(q, k, position_ids + later)


class _RoundedRotary(FopeRotary):
    """Every token stands at a whole position."""

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, position_ids.round())


def _changed(rotary: FopeRotary, kind: type[FopeRotary] = FopeRotary, **fields: object) -> FopeRotary:
    """A copy with other constants and behaviour; where a user's subclass wraps the rotation, what it wraps changes."""
    wrong = copy.deepcopy(rotary)
    wrong.config = msgspec.structs.replace(rotary.config, **fields)
    if kind is not FopeRotary:
        own = type(rotary)
        wrong.__class__ = kind if own is FopeRotary else type(kind.__name__, (own, kind), {})
    return wrong


def _other_pad(rotary: FopeRotary) -> FopeRotary:
    return _changed(rotary, sin_pad=rotary.config.sin_pad + 1.0)


def _swapped_heads(rotary: FopeRotary) -> FopeRotary:
    wrong = _changed(rotary)
    order = [*range(rotary.config.groups)]
    order[:2] = reversed(order[:2])
    wrong.sin_coef, wrong.cos_coef = (
        nn.Parameter(coef[order], requires_grad=False) for coef in (rotary.sin_coef, rotary.cos_coef)
    )
    return wrong


def _shifted(rotary: FopeRotary) -> FopeRotary:
    return _changed(rotary, _ShiftedRotary)


def _half_precision(rotary: FopeRotary) -> FopeRotary:
    return _changed(rotary, _HalfRotary, full_precision=False)


def _unscaled(rotary: FopeRotary) -> FopeRotary:
    return _changed(rotary, _UnscaledRotary)


def _other_axes(rotary: FopeRotary) -> FopeRotary:
    wrong, axes = _changed(rotary), rotary.config.axes
    wrong.axis = None if rotary.axis is None else (rotary.axis + 1) % axes
    return wrong


def _one_basis(rotary: FopeRotary) -> FopeRotary:
    wrong, count = _changed(rotary), rotary.config.frequencies
    if rotary.config.bases > 1:
        for coef, other in ((wrong.sin_coef, slice(count, None)), (wrong.cos_coef, slice(count))):
            coef.requires_grad_(False)[:, other] = 0
    return wrong


def _rounded(rotary: FopeRotary) -> FopeRotary:
    return _changed(rotary, _RoundedRotary)


def _spectra(model: nn.Module) -> list[Spectrum]:
    return [rotary.spectrum for rotary in rotaries(model).values()]


def _unpadded(model: nn.Module) -> str:
    padded = any(spectrum.config.pairs < spectrum.config.rotary_dim // 2 for spectrum in _spectra(model))
    return "" if padded else "no pair is padded"


def _unfolded(model: nn.Module) -> str:
    configs = [spectrum.config for spectrum in _spectra(model)]
    folded = any(c.rotary_dim < c.head_dim and scale_of(c) != 1.0 for c in configs)
    return "" if folded else "no padding is folded"


def _shared(model: nn.Module) -> str:
    coefs = [coef for spectrum in _spectra(model) for coef in (spectrum.sin_coef, spectrum.cos_coef)]
    differ = any(len(coef) > 1 and not np.array_equal(coef[0], coef[1]) for coef in coefs)
    return "" if differ else "heads have the same coefficients"


def _one_axis(model: nn.Module) -> str:
    several = any(len({*spectrum.config.axis}) > 1 for spectrum in _spectra(model))
    return "" if several else "all frequencies turn by one position"


def _without_phases(model: nn.Module) -> str:
    phases = any(spectrum.config.bases > 1 and spectrum.config.pairs for spectrum in _spectra(model))
    return "" if phases else "no pair has a phase"


def _without_position(model: nn.Module) -> str:
    return "" if any(spectrum.config.pairs for spectrum in _spectra(model)) else "the model has no position embedding"


def _in_half_already(model: nn.Module) -> str:
    half = any(p.is_floating_point() and p.dtype.itemsize < torch.float32.itemsize for p in model.parameters())
    return "the model itself is in half precision" if half else _without_position(model)


CONTROLS = (
    Control("sine of the padding changed", _unpadded, _other_pad),
    Control("coefficients of two heads swapped", _shared, _swapped_heads),
    Control("positions shifted by one", _without_position, _shifted),
    Control("rotation in half precision", _in_half_already, _half_precision),
)
FOLDED = Control("scale of folded padding forgotten", _unfolded, _unscaled)
"""For models whose padding was folded."""
AXES = Control("axes of positions swapped", _one_axis, _other_axes)
"""For graphs whose tokens have positions on several axes, and cases in which these differ."""
PHASES = Control("phases dropped", _without_phases, _one_basis)
"""For models with coefficients over both bases."""
ROUNDED = Control("positions rounded", _without_position, _rounded)
"""For cases with positions between the whole ones."""
