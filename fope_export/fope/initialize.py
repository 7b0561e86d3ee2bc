"""The coefficients' starting values: the authors' six, each frozen noise around (or instead of) the identity."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from fope_export.errors import ConfigError


def _zeros(tensor: Tensor, gain: float, generator: Generator | None) -> Tensor:  # noqa: ARG001
    return nn.init.zeros_(tensor)


def _normal(tensor: Tensor, gain: float, generator: Generator | None) -> Tensor:
    return nn.init.normal_(tensor, std=gain, generator=generator)


INITIALIZATIONS: dict[str, tuple[Callable[[Tensor, float, Generator | None], Tensor], bool]] = {
    "eye": (_zeros, True),
    "eye_norm": (_normal, True),
    "eye_xavier_norm": (nn.init.xavier_normal_, True),
    "eye_xavier_uniform": (nn.init.xavier_uniform_, True),
    "xavier_norm": (nn.init.xavier_normal_, False),
    "xavier_uniform": (nn.init.xavier_uniform_, False),
}
"""Name -> the noise, and whether the identity is added. The plain xavier ones ignore the gain, as the authors' do."""


def initial_coefficients(
    shape: tuple[int, int, int], init: str, gain: float, generator: Generator | None = None
) -> Tensor:
    """float32 [G, D, F]. With G > 1 the fans are those of the whole three-dimensional tensor, as in the authors' code:
    xavier noise has standard deviation gain * sqrt(2 / ((G + D) * F)).

    Raises ConfigError for an unknown `init`.
    """
    if init not in INITIALIZATIONS:
        raise ConfigError(f"unknown initialization {init!r}", hint=f"One of: {', '.join(INITIALIZATIONS)}.")
    noise, with_eye = INITIALIZATIONS[init]
    groups, count, pairs = shape
    coef = noise(torch.empty(shape if groups > 1 else shape[1:]), gain if with_eye else 1.0, generator).reshape(shape)
    return coef + identity(count, pairs) if with_eye else coef


def identity(count: int, pairs: int) -> Tensor:
    """float32 [D, F]: the identity where square, else pair i starts at frequency i * ceil(D / F) while there is one."""
    step = math.ceil(count / pairs)
    eye = torch.zeros(count, pairs)
    rows = torch.arange(0, count, step)[:pairs]
    eye[rows, torch.arange(len(rows))] = 1.0
    return eye
