"""What holds a rendering of the rotation to the fields of a spectrum: each is changed, and the results must follow."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fope_export.fope import contract
from fope_export.fope.spectrum import Spectrum

Changes = dict[str, Any]
Results = Sequence[NDArray[Any]]
Render = Callable[[Changes], Results]
"""What a rendering computes of fixed inputs with these fields of a spectrum changed."""
OTHERS: dict[str, Any] = {
    "sin_pad": 0.25, "cos_pad": -0.5, "sign": -1, "interleaved": "interleaved", "rotary_dim": 12,
    "full_precision": False,
}  # fmt: skip
"""Setting of the contract -> another value of the field that it tells than spectra here have."""
EXTENSIONS: dict[str, Any] = {"axis": (1, 2, 0, 1, 2), "bases": 1}
"""The same of what tensors tell, for a spectrum of 5 frequencies on 3 axes and over both bases."""
ROUNDS = ("full_precision",)
"""Settings that mean the same, rounded otherwise."""
MARGIN = 8
"""How many times closer to the truth a rendering is than one that does not follow."""


def field_of(name: str) -> str:
    """What a spectrum's configuration calls what a setting or a tensor tells."""
    return contract.SETTINGS[name].field if name in contract.SETTINGS else name


def changed(spectrum: Spectrum, changes: Changes) -> Spectrum:
    """The same numbers with other fields; those over one basis, where the other is left out."""
    config, numbers = msgspec.structs.replace(spectrum.config, **changes), {}
    if config.bases < spectrum.config.bases:
        count = config.frequencies
        numbers = {"sin_coef": spectrum.sin_coef[:, :count], "cos_coef": spectrum.cos_coef[:, count:]}
    return replace(spectrum, config=config, **numbers)


def held(setting: str, render: Render, truth: Render) -> None:
    """Raises AssertionError where a rendering does not follow one setting or extension as the truth does."""
    changes = {field_of(setting): (OTHERS | EXTENSIONS)[setting]}
    got, wanted = render(changes), truth(changes)
    if setting in ROUNDS:
        assert apart(got, render({})) > 0, f"{setting} changes nothing"
    else:
        effect, error = apart(wanted, truth({})), apart(got, wanted)
        assert MARGIN * error < effect, f"{setting} changes {effect:.3g}, and the error is {error:.3g}"


def apart(some: Results, others: Results) -> float:
    """Infinite for other shapes."""
    pairs = list(zip(some, others, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return np.inf
    return max(float(abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in pairs)


def forgetting(setting: str, render: Render) -> Render:
    """The rendering, from which one field of the spectrum was taken away."""
    return lambda changes: render({k: v for k, v in changes.items() if k != field_of(setting)})
