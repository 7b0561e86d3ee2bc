"""The canonical spectrum: what every layout's flags and coefficients come down to (arXiv 2412.17739, Eq. 13)."""

import hashlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fope_export.config import CONTRADICTION, SpectrumConfig, convert
from fope_export.errors import ConfigError
from fope_export.fope import contract

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One layer's position embedding, whole: its settings, `config`, and its numbers.

    freq      [D]        float32, radians per token, not negative and not ascending
    sin_coef  [G, J, F]  float32, how much of each frequency's sine is in that of each rotated channel pair
    cos_coef  [G, J, F]  float32, the same for the cosine

    J is D, or, where `config.bases` is 2, 2 D: then each is a mixture of D sines and D cosines, in this order.

    Raises ConfigError when the numbers do not have the shapes that `config` states, or are not finite.

    >>> import fope_export as fx, numpy as np
    >>> spectrum = fx.Spectrum.rope(np.float32([1, 0.1, 0.01, 0]), head_dim=8)
    >>> spectrum.freq.shape, spectrum.sin_coef.shape
    ((3,), (1, 3, 3))
    """

    config: SpectrumConfig
    freq: Floats
    sin_coef: Floats
    cos_coef: Floats

    def __post_init__(self) -> None:
        sizes = {letter: getattr(self.config, field) for field, letter in contract.SIZES.items()}
        sizes["J"] = self.config.rows
        for port in contract.NUMBERS:
            name, shape = port.name, tuple(sizes[letter] for letter in port.shape)
            value = getattr(self, name)
            if value.shape != shape or value.dtype != np.float32:
                raise ConfigError(
                    f"{name} is {value.dtype} {value.shape}, expected float32 {shape}", hint=CONTRADICTION
                )
            if not np.isfinite(value).all():
                raise ConfigError(f"{name} holds values that are not finite", hint=CONTRADICTION)
        if (self.freq < 0).any() or (np.diff(self.freq) > 0).any():
            raise ConfigError("frequencies must descend and not be negative", hint=CONTRADICTION)

    @classmethod
    def rope(cls, freq: Floats, head_dim: int, *, scale: float = 1.0, pairing: str = "half") -> Self:
        """RoPE with `freq` [head_dim / 2], in radians per token and descending: each pair of channels turns with its
        own frequency, and stays where that is 0.

        `scale` multiplies sine and cosine (the attention factor of Hugging Face's YARN). `pairing` says which channels
        are a pair: "half", one of the first half and one of the second, or "interleaved", neighbours. Raises
        ConfigError as the class does.
        """
        kept = np.ascontiguousarray(freq[freq != 0], dtype=np.float32)
        eye = (np.eye(len(kept), dtype=np.float32) * np.float32(scale))[None]
        return cls._of(kept, eye, eye, head_dim, sin_pad=0.0, cos_pad=scale, pairing=pairing)

    @classmethod
    def nope(cls, head_dim: int) -> Self:
        """No position embedding, for heads of `head_dim` channels: nothing is rotated."""
        return cls.rope(np.zeros(0, np.float32), head_dim)

    @classmethod
    def fope(cls, freq: Floats, sin_coef: Floats, cos_coef: Floats, head_dim: int, **fields: Any) -> Self:
        """The authors' FoPE, with `freq` [D], `sin_coef` and `cos_coef` [G, J, F], for heads of `head_dim` channels:
        sine and cosine of the unrotated pairs are both 1. `fields` are other settings of SpectrumConfig, by name.
        Raises ConfigError as the class does.
        """
        return cls._of(freq, sin_coef, cos_coef, head_dim, **{"sin_pad": 1.0, "cos_pad": 1.0} | fields)

    @classmethod
    def _of(cls, freq: Floats, sin_coef: Floats, cos_coef: Floats, head_dim: int, **fields: Any) -> Self:
        groups, rows, pairs = sin_coef.shape
        sizes = {
            "head_dim": head_dim,
            "rotary_dim": head_dim,
            "frequencies": rows // fields.get("bases", 1),
            "pairs": pairs,
            "groups": groups,
        }
        fields = {"sign": 1, "pairing": "half", "full_precision": True} | sizes | fields
        return cls(convert(fields, SpectrumConfig, where="spectrum"), freq, sin_coef, cos_coef)

    def describe(self) -> dict[str, Any]:
        """The numbers as plain data, for a manifest: frequencies, and of the long coefficients their SHA-256."""
        digest = {
            f"{name}_sha256": hashlib.sha256(getattr(self, name).tobytes()).hexdigest()
            for name in ("sin_coef", "cos_coef")
        }
        return {"freq": [float(f) for f in self.freq], **digest}
