"""The rotation operator's single description; torch, ONNX, TensorRT and CUDA are compared with it.

Shapes: B batch, S sequence, A axes of positions, H query heads, K key-value heads, E head_dim, R rotary_dim (even,
2F <= R <= E), D kept frequencies, J rows of coefficients (D, or 2D over both bases), F rotated pairs, G coefficient
groups (1, or as many as key-value heads). Standard library only, so that everything may import it.

There are two versions. PLAIN has whole positions on one axis and coefficients over one basis. GENERAL has any number
of axes, an axis for each frequency, positions that may be fractions, and coefficients over one basis or both.
"""

from collections.abc import Mapping
from dataclasses import dataclass

DOMAIN = "fope"
NAME = "FopeRotary"
PLAIN, GENERAL = VERSIONS = 1, 2
TORCH_NAME = "fope::rotary"


@dataclass(frozen=True)
class Port:
    """One tensor of the operator. `dtype` is a type, "T" for the model's own (float32, float16, bfloat16), or "P" for
    that of positions (int64, float32).
    """

    name: str
    dtype: str
    shape: tuple[str, ...]


_QUERIES = (Port("q", "T", ("B", "S", "H", "E")), Port("k", "T", ("B", "S", "K", "E")))
NUMBERS = (
    Port("freq", "float32", ("D",)),
    Port("sin_coef", "float32", ("G", "J", "F")),
    Port("cos_coef", "float32", ("G", "J", "F")),
)
"""What a spectrum is made of beside its configuration. Of 2D rows the first D are of sines, the others of cosines."""
AXIS = Port("axis", "int64", ("D",))
"""Which of a token's positions each frequency takes: angle[d] = position[axis[d]] * freq[d]."""
INPUTS = {
    PLAIN: (*_QUERIES, Port("position_ids", "int64", ("B", "S")), *NUMBERS),  # J is D
    GENERAL: (*_QUERIES, Port("position_ids", "P", ("A", "B", "S")), *NUMBERS, AXIS),
}
OUTPUTS = (
    Port("q_rotated", "T", ("B", "S", "H", "E")),
    Port("k_rotated", "T", ("B", "S", "K", "E")),
)


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
SIZES = {"head_dim": "E", "frequencies": "D", "pairs": "F", "groups": "G", "axes": "A", "bases": "J / D"}
"""The other fields of a spectrum's configuration, which the tensors' shapes tell; and AXIS is one that is a tensor."""
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
DISPATCH = {version: {"plugin_namespace": DOMAIN, "plugin_version": str(version)} for version in VERSIONS}
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
