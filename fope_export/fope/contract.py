"""The rotation operator's single description; torch, ONNX, TensorRT and CUDA are compared with it.

Shapes: B batch, S sequence, H query heads, K key-value heads, E head_dim, R rotary_dim (even, 2F <= R <= E), D kept
frequencies, F rotated pairs, G coefficient groups (1, or as many as key-value heads). Standard library only, so that
everything may import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

DOMAIN = "fope"
NAME = "FopeRotary"
VERSION = 1
TORCH_NAME = "fope::rotary"


@dataclass(frozen=True)
class Port:
    """One tensor of the operator. `dtype` is a type, or "T" for the model's own (float32, float16, bfloat16)."""

    name: str
    dtype: str
    shape: tuple[str, ...]


INPUTS = (
    Port("q", "T", ("B", "S", "H", "E")),
    Port("k", "T", ("B", "S", "K", "E")),
    Port("position_ids", "int64", ("B", "S")),
    Port("freq", "float32", ("D",)),
    Port("sin_coef", "float32", ("G", "D", "F")),
    Port("cos_coef", "float32", ("G", "D", "F")),
)
OUTPUTS = (
    Port("q_rotated", "T", ("B", "S", "H", "E")),
    Port("k_rotated", "T", ("B", "S", "K", "E")),
)
NUMBERS = INPUTS[3:]
"""What a spectrum is made of beside its configuration."""


@dataclass(frozen=True)
class Setting:
    """What the operator is told of a spectrum's configuration: a field as a `kind`, or whether it is `value`."""

    kind: type[float] | type[int] | type[bool]
    field: str
    value: str | None = None

    def of(self, configuration: object) -> float:
        """Its value for one spectrum."""
        said = getattr(configuration, self.field)
        return self.kind(said if self.value is None else said == self.value)


SETTINGS = {
    "sin_pad": Setting(float, "sin_pad"),  # sine of the R/2 - F pairs that no frequency turns
    "cos_pad": Setting(float, "cos_pad"),  # and their cosine
    "sign": Setting(float, "sign"),  # +1 (the authors' code) or -1 (the paper's appendix)
    "interleaved": Setting(bool, "pairing", "interleaved"),  # pairs are (2i, 2i + 1) instead of (i, i + R/2)
    "rotary_dim": Setting(int, "rotary_dim"),  # R, the first channels of a head, which form pairs; others stay
    "full_precision": Setting(bool, "full_precision"),  # rotate in float32 whatever T is, instead of in T
}
"""What the spectrum decides beside its numbers; the arguments of the torch operator after its tensors."""
SIZES = {"head_dim": "E", "frequencies": "D", "pairs": "F", "groups": "G"}
"""The other fields of a spectrum's configuration, which the tensors' shapes tell."""
FLOAT = 1
"""float32 as an ONNX element type."""
ATTRIBUTES: dict[str, type] = {
    **{name: int if of.kind is bool else of.kind for name, of in SETTINGS.items() if name != "full_precision"},
    "compute_dtype": int,  # ONNX element type that the rotation runs in: float32 with full precision, else T's
    "head_dim": int,  # E
    "heads_per_group": int,  # H / G
    "kv_heads_per_group": int,  # K / G
}
"""What the ONNX node carries: the settings, and the shapes that a function's body cannot derive."""
DISPATCH = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""What TensorRT looks for on the node before it takes a plugin instead of the function's body."""


def settings(configuration: object) -> dict[str, float]:
    """SETTINGS as a spectrum's configuration has them."""
    return {name: setting.of(configuration) for name, setting in SETTINGS.items()}


def attributes(
    told: Mapping[str, float], *, dtype: int, head_dim: int, heads: int, kv_heads: int, groups: int
) -> dict[str, float]:
    """ATTRIBUTES of a call with the settings `told`, whose T is the ONNX element type `dtype`."""
    values = {
        **told,
        "compute_dtype": FLOAT if told["full_precision"] else dtype,
        "head_dim": head_dim,
        "heads_per_group": heads // groups,
        "kv_heads_per_group": kv_heads // groups,
    }
    return {name: kind(values[name]) for name, kind in ATTRIBUTES.items()}
