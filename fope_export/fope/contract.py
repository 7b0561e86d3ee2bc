"""The rotation operator's single description; torch, ONNX, TensorRT and CUDA are compared with it.

Shapes: B batch, S sequence, H query heads, K key-value heads, E head_dim, R rotary_dim (even, 2F <= R <= E), D kept
frequencies, F rotated pairs, G coefficient groups (1, or as many as key-value heads). Standard library only, so that
everything may import it.
"""

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
SETTINGS: dict[str, type] = {
    "sin_pad": float,  # sine of the R/2 - F pairs that no frequency turns
    "cos_pad": float,  # and their cosine
    "sign": float,  # +1 (the authors' code) or -1 (the paper's appendix)
    "interleaved": bool,  # pairs are (2i, 2i + 1) instead of (i, i + R/2)
    "rotary_dim": int,  # R, the first channels of a head, which form pairs; the others pass as they are
    "full_precision": bool,  # rotate in float32 whatever T is, instead of in T
}
"""What the spectrum decides beside its numbers; the arguments of the torch operator after its tensors."""
ATTRIBUTES: dict[str, type] = {
    "sin_pad": float,
    "cos_pad": float,
    "sign": float,
    "interleaved": int,
    "rotary_dim": int,
    "compute_dtype": int,  # ONNX element type that the rotation runs in: 1 with full precision, else T's
    "head_dim": int,  # E
    "heads_per_group": int,  # H / G
    "kv_heads_per_group": int,  # K / G
}
"""What the ONNX node carries: the settings, and the shapes that a function's body cannot derive."""
DISPATCH = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""What TensorRT looks for on the node before it takes a plugin instead of the function's body."""
