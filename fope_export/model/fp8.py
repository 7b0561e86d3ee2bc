"""Weights of 8 bits with a scale for each block of 128 x 128, as DeepSeek-V3 defined them and Qwen3 and Intern-S1-Pro
store them: `<weight>` in float8, and `<weight>_scale_inv`, which it is multiplied by.

With `scale_fmt` "ue8m0" (config.json of DeepSeek-V3.1 and of Intern-S1-Pro) every scale is a power of two. DeepSeek's
own code (inference/kernel.py, weight_dequant) takes it as the number that it is, in a dtype that holds numbers; others
store the byte of its exponent alone, as torch's float8_e8m0fnu or in uint8: 2 ** (byte - 127), and 255 is no number
(OCP Microscaling Formats 1.0, section 5.4.1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fope_export.errors import CheckpointError, ConfigError

SCALE = "_scale_inv"
"""The ending of the tensor that holds the scales of a weight."""
BLOCK = 128
EXPONENTS = "ue8m0"
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu)
"""What a scale may be stored in, and then is by its own value."""
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "weight_block_size": ([BLOCK, BLOCK],),
    "fmt": (None, *FORMATS),
    "scale_fmt": (None, EXPONENTS),
    "activation_scheme": (None, "dynamic"),
    "dequantize": (None, False, True),  # how a loader is to compute, which changes no weight
}
EXCEPT = "modules_to_not_convert"
HINT = "Convert the checkpoint to bfloat16 first."


@dataclass(frozen=True)
class Fp8:
    """What a `quantization_config` says about 8-bit weights."""

    weights: tuple[torch.dtype, ...]
    exponents: bool
    """Whether a uint8 is the exponent of a scale."""
    plain: frozenset[str]
    """Modules whose weights are not of 8 bits."""

    @classmethod
    def of(cls, config: Mapping[str, Any], named: Callable[[str], str] = lambda name: name) -> "Fp8":
        """`named` makes a name in the file the one that `multiplied` is given.

        Raises ConfigError naming the first field that means another way of storing."""
        for name, supported in SUPPORTED.items():
            if (given := config.get(name)) not in supported:
                wanted = " or ".join(repr(value) for value in supported if value is not None)
                raise ConfigError(f"quantization_config.{name} is {given!r}, and only {wanted} is supported", hint=HINT)
        if unknown := sorted(config.keys() - SUPPORTED.keys() - {EXCEPT}):
            raise ConfigError(f"quantization_config.{unknown[0]} is not known, and could mean other weights", hint=HINT)
        plain = config.get(EXCEPT) or []
        if not isinstance(plain, list) or not all(isinstance(name, str) for name in plain):
            raise ConfigError(f"quantization_config.{EXCEPT} is no list of names", hint=HINT)
        kind = config.get("fmt")
        weights = (FORMATS[kind],) if kind else tuple(FORMATS.values())
        return cls(
            weights, config.get("scale_fmt") == EXPONENTS, frozenset(named(f"{name}.").rstrip(".") for name in plain)
        )

    def multiplied(self, name: str, weight: Tensor, scale: Tensor, where: str) -> Tensor:
        """The weight `name` in float32.

        Raises CheckpointError where weight or scales are not what the configuration says.
        """
        if weight.dtype not in self.weights or name.removesuffix(".weight") in self.plain:
            raise CheckpointError(
                f"{where} is {weight.dtype}, which quantization_config does not say of it",
                hint="Were configuration and weights written by the same tool?",
            )
        wanted = tuple(-(-size // BLOCK) for size in weight.shape)
        if weight.ndim != 2 or tuple(scale.shape) != wanted:
            raise CheckpointError(
                f"{where} has scales {tuple(scale.shape)}, expected {wanted} for blocks of {BLOCK} x {BLOCK}",
                hint="Other block sizes are not read.",
            )
        rows, columns = weight.shape
        numbers = self.numbers(scale, where)
        spread = numbers.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return weight.float() * spread

    def numbers(self, scale: Tensor, where: str) -> Tensor:
        """Stored scales as the float32 numbers that they stand for."""
        if scale.dtype == torch.uint8 and self.exponents:
            scale = scale.contiguous().view(torch.float8_e8m0fnu)
        if scale.dtype not in NUMBERS:
            raise CheckpointError(
                f"{where} has scales in {scale.dtype}, and nothing says what these stand for",
                hint=f'uint8 is read as exponents where quantization_config.scale_fmt is "{EXPONENTS}".',
            )
        numbers = scale.float()
        if not (numbers.isfinite() & (numbers >= 0)).all():
            raise CheckpointError(
                f"{where} has scales that are NaN, infinite or negative", hint="The file is damaged: copy it again."
            )
        return numbers
