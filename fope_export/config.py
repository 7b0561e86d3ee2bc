"""Configuration: frozen, closed (an unknown key is an error: a dropped flag is a wrong model), checked at birth."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec

from fope_export.closed import convert as convert
from fope_export.dtypes import DTYPES, FP32, either
from fope_export.errors import ConfigError
from fope_export.quantizations import QUANTIZATIONS, BlockSize, Quantization, RoundingName, in_blocks

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
Channels = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
"""Of one head. These two have far more than any model, and little enough to be made before weights are looked at."""
Axes = Annotated[int, msgspec.Meta(ge=1, le=1 << 6)]
"""Positions that a token may have."""
Positive = Annotated[float, msgspec.Meta(gt=0)]
EXPERTS = 1 << 20
"""Experts of all layers together, at most."""
CONTRADICTION = "Compare with the configuration that the model was trained with."


class Checked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration whose fields are checked against their types whichever way it is made.

    Raises ConfigError naming the field.
    """

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as cause:
                raise ConfigError(f"{field.name}: {cause}", hint=CONTRADICTION) from cause
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name} is {value}, expected a finite number", hint=CONTRADICTION)


class SpectrumConfig(Checked, frozen=True, kw_only=True, omit_defaults=True):
    """What one layer's position embedding is, apart from its numbers. No field of plain FoPE has a default: a guess is
    a wrong model. The last three are extensions of it, and left out where it has none.

    D kept frequencies are mixed into F rotated channel pairs, separately for each of G coefficient groups; the other
    rotary_dim / 2 - F pairs are "rotated" by the constants `sin_pad` and `cos_pad`. What a head has beyond its first
    rotary_dim channels is left as it is.
    """

    head_dim: Channels
    rotary_dim: Channels
    frequencies: Size  # D
    pairs: Size  # F
    groups: Count  # G
    sin_pad: float
    cos_pad: float
    sign: Literal[1, -1]
    pairing: Literal["half", "interleaved"]
    full_precision: bool  # rotate in float32 whatever the model's dtype
    axes: Axes = 1  # A, the positions of a token (of an image's: time, height, width)
    axis: tuple[Size, ...] = ()  # which of them each frequency takes; nothing where there is one
    bases: Literal[1, 2] = 1  # 2: sine and cosine are each a mixture of sines and cosines

    @property
    def rows(self) -> int:
        """J, what each series is a mixture of."""
        return self.bases * self.frequencies

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.axes > 1 and len(self.axis) != self.frequencies) or (self.axes == 1 and self.axis):
            raise ConfigError(
                f"{self.axes} axes of positions, and axis names {len(self.axis)} for {self.frequencies} frequencies",
                hint=CONTRADICTION,
            )
        if self.axis and max(self.axis) >= self.axes:
            raise ConfigError(f"axis names {max(self.axis)}, and there are {self.axes} from 0 on", hint=CONTRADICTION)
        for name in ("head_dim", "rotary_dim"):
            if (size := getattr(self, name)) % 2:
                raise ConfigError(f"{name} is {size}, and channel pairs need an even one", hint=CONTRADICTION)
        if self.rotary_dim > self.head_dim:
            raise ConfigError(f"rotary_dim is {self.rotary_dim}, and head_dim is {self.head_dim}", hint=CONTRADICTION)
        if self.pairs > self.rotary_dim // 2:
            raise ConfigError(f"{self.pairs} pairs do not fit a rotary_dim of {self.rotary_dim}", hint=CONTRADICTION)
        if self.pairs and not self.frequencies:
            raise ConfigError(f"{self.pairs} pairs have no frequency to turn with", hint=CONTRADICTION)


class ExpertsConfig(Checked, frozen=True, kw_only=True):
    """A mixture of experts in the place of some layers' feed-forward part. `layers` says of which."""

    count: Count
    per_token: Count
    intermediate_size: Count
    groups: Count  # the router takes per_token / groups experts from each of these; 1: from all
    normalize: bool  # the chosen experts' weights sum to 1
    layers: tuple[Size, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count * len(self.layers) > EXPERTS:
            raise ConfigError(f"{self.count} experts in {len(self.layers)} layers are too many", hint=CONTRADICTION)
        if self.count % self.groups or self.per_token % self.groups or self.per_token > self.count:
            raise ConfigError(
                f"{self.per_token} of {self.count} experts cannot be taken evenly from {self.groups} groups",
                hint=CONTRADICTION,
            )


class ModelConfig(Checked, frozen=True, kw_only=True, tag_field="model_type", tag="fope"):
    """A pre-norm decoder: RMSNorm, fused attention projection, FoPE, SwiGLU."""

    vocab_size: Count  # rows of the embedding, padding rows included
    hidden_size: Count
    intermediate_size: Count
    num_layers: Layers
    num_heads: Count
    num_kv_heads: Count
    norm_eps: Positive
    tie_embeddings: bool
    training_length: Count  # tokens; it decides which frequencies were kept
    rope_theta: Positive | None  # base of the frequencies, where they follow theta ** (-2i / head_dim)
    floored: bool  # frequencies without one whole period in training_length were removed
    eos_token_id: Size | tuple[Size, ...] | None  # any of several ends a text
    pad_token_id: Size | None
    spectrum: SpectrumConfig
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation
    qkv_bias: bool = False
    out_bias: bool = False  # of attention's output projection
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts and max(self.experts.layers, default=0) >= self.num_layers:
            raise ConfigError(
                f"layer {max(self.experts.layers)} has experts, and there are {self.num_layers}", hint=CONTRADICTION
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads", hint=CONTRADICTION
            )
        if self.num_kv_heads % self.spectrum.groups:
            raise ConfigError(
                f"{self.spectrum.groups} coefficient groups do not divide {self.num_kv_heads} key-value heads",
                hint="Coefficients are shared (1 group) or per key-value head.",
            )
        for name in ("eos_token_id", "pad_token_id"):
            if (token := max(tokens_of(getattr(self, name)), default=0)) >= self.vocab_size:
                raise ConfigError(
                    f"{name} is {token}, outside a vocabulary of {self.vocab_size}", hint="Null means none."
                )

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return tokens_of(self.eos_token_id)


Tokens = int | Sequence[int] | None
"""How configurations write token ids: none, one or several."""


def tokens_of(written: Tokens) -> tuple[int, ...]:
    """Each token once."""
    listed = () if written is None else (written,) if isinstance(written, int) else written
    return tuple(dict.fromkeys(listed))


def as_written(tokens: Iterable[int]) -> int | tuple[int, ...] | None:
    """Tokens as configurations write them."""
    distinct = tuple(dict.fromkeys(tokens))
    return distinct if len(distinct) > 1 else distinct[0] if distinct else None


CacheName: TypeAlias = Literal["dynamic", "static"]
LayoutName: TypeAlias = Literal["transformers.js"]
if TYPE_CHECKING:
    DtypeName: TypeAlias = str
    QuantizationName: TypeAlias = str
else:  # what the tables hold
    DtypeName, QuantizationName = Literal[*DTYPES], Literal[*QUANTIZATIONS]


class ExportConfig(Checked, frozen=True, kw_only=True):
    """How a model is written as ONNX. The defaults give the portable file that every runtime takes.

    `cache` is "dynamic", which grows with every step, or "static", which has room for `capacity` tokens, is written in
    place, and needs opset 24. Weights, activations and cache are of `dtype`; angles, series and statistics are float32
    in any case. `quantize` names how linear layers are rounded: their weights, or weights and calibrated inputs. Of
    weights alone, a `block` of inputs shares a step, or fewer, as a layer has them; `rounding` is "nearest", or
    "compensated": up or down, so that outputs on sample text change little.
    `extend` changes the frequencies for contexts of `extend_to` tokens, longer than in training. `fold_padding` leaves
    padded channel pairs unrotated, with their constant factor in the q and k projections. `position_axes` has the graph
    take a token's positions on all axes that the model has, as images need it; text alone needs one. With `inline` the
    rotation is written out where the graph calls it, for readers that know no functions. A `layout` has the files lie
    as another program looks for them: of a growing cache, and of tokens with one position, as transformers.js does.

    An `opset`, `capacity`, `extend_to` or `block` of None is chosen by `resolved`, which `export` calls: the lowest
    opset, the row's block, and room for 16 times the training length or 8192 tokens, whichever is less, but never less
    than the training length. A `rounding` of None is chosen by `export`.

    Raises ConfigError for a value that is not allowed, and for values that exclude each other.

    >>> import fope_export as fx
    >>> resolved = fx.ExportConfig(cache="static").resolved(training_length=256)
    >>> resolved.opset, resolved.capacity
    (24, 4096)
    """

    opset: Literal[23, 24] | None = None
    cache: CacheName = "dynamic"
    dtype: DtypeName = FP32.name
    capacity: Count | None = None
    extend: Literal["pi", "yarn"] | None = None
    extend_to: Count | None = None
    quantize: QuantizationName | None = None
    fold_padding: bool = False
    position_axes: bool = False
    block: BlockSize | None = None
    rounding: RoundingName | None = None
    inline: bool = False
    layout: LayoutName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        static, row = self.cache == "static", self.quantization
        if row and row.dtypes and not row.takes(self.dtype):
            others = either(other for other in QUANTIZATIONS.values() if other.takes(self.dtype))
            raise ConfigError(
                f"quantize is {row.name} and dtype is {self.dtype}, "
                f"but ONNX Runtime has no such product in {self.dtype}",
                hint=f"Choose dtype {either(row.dtypes)}, or quantize {others}.",
            )
        if (self.block or self.rounding) and not (row and row.block):
            name, value = ("block", self.block) if self.block else ("rounding", self.rounding)
            raise ConfigError(
                f"{name} is {value}, and quantize {self.quantize} rounds no weights in blocks",
                hint=f"Choose quantize {either(in_blocks())}, or leave it out.",
            )
        if static and self.opset == 23:
            raise ConfigError("a static cache needs opset 24, not 23", hint="Leave the opset out.")
        if self.layout and (static or self.position_axes):
            raise ConfigError(
                f"{self.layout} feeds a growing cache and one position a token, and this is to have "
                f"{'a static cache' if static else 'positions on all axes'}",
                hint="Leave the layout out.",
            )
        if self.extend_to and not self.extend:
            raise ConfigError("extend_to says how far, and not how", hint="Choose pi or yarn for extend.")
        if self.capacity and not static:
            raise ConfigError("a dynamic cache has no capacity", hint="Ask for a static cache, or leave it out.")

    @property
    def calibrated(self) -> bool:
        """Whether linear layers round not only their weights, but their inputs too, as calibration found."""
        return self.quantization is not None and self.quantization.rounds_inputs

    @property
    def quantization(self) -> Quantization | None:
        """The row of the table that `quantize` names; None where linear layers are not rounded."""
        return QUANTIZATIONS[self.quantize] if self.quantize else None

    @property
    def precision(self) -> str:
        """The whole name of the dtype, such as "float32"."""
        return DTYPES[self.dtype].precision

    @property
    def described(self) -> str:
        """What was chosen, in a few words for people to read."""
        room = f" of {self.capacity} tokens" if self.capacity else ""
        rounded = "layers" if self.calibrated else "weights"
        weights = f", {self.quantize} {rounded}" if self.quantize else ""
        weights += f" in blocks of {self.block}, {self.rounding}" if self.block else ""
        longer = f", {self.extend} to {self.extend_to} tokens" if self.extend else ""
        folded = ", padding folded" if self.fold_padding else ""
        axes = ", positions on all axes" if self.position_axes else ""
        inline = ", inlined" if self.inline else ""
        layout = f", for {self.layout}" if self.layout else ""
        return (
            f"opset {self.opset}, {self.dtype}{weights}, {self.cache} cache{room}{longer}{folded}{axes}{inline}{layout}"
        )

    def resolved(self, training_length: int) -> "ExportConfig":
        """The same with an opset, and a capacity, `extend_to` or block where they apply, in the place of None; for a
        model that was trained on `training_length` tokens.
        """
        static = self.cache == "static"
        room = usual_length(training_length) if static else None
        opset = self.opset or (24 if static else 23)
        extend_to = (self.extend_to or usual_length(training_length)) if self.extend else None
        room, block = self.capacity or room, self.block or (self.quantization and self.quantization.block) or None
        return msgspec.structs.replace(self, opset=opset, capacity=room, extend_to=extend_to, block=block)


class BuildConfig(Checked, frozen=True, kw_only=True):
    """How a TensorRT engine is built.

    `target` is "tensorrt", which builds for the GPU at hand, or "tensorrt-rtx", which builds for the GPUs behind a
    colon ("tensorrt-rtx:sm86,sm89") without one. With `plugin` the rotation is one fused kernel, else what TensorRT
    makes of the graph. The engine takes at most `max_batch` rows of `max_length` tokens, prompt and answer together
    (None: a static cache's capacity, or the usual length). `sizes` are for the bundle of a module: by name, the least,
    the usual and the largest value of each size. `timing_cache` keeps what was measured for the next build. `tf32` lets
    products of float32 matrices be rounded to 10 bits. `refit` makes weights exchangeable, and `strip` leaves them out,
    to be put in later. `version_compatible` and `hardware_compatible` are for other versions and other GPUs than those
    of the build, where the library can do that.

    Raises ConfigError for a target of another form, and for sizes that do not ascend.

    >>> import fope_export as fx
    >>> fx.BuildConfig(target="tensorrt-rtx:sm89,sm120").architectures
    ('sm89', 'sm120')
    """

    target: str = "tensorrt-rtx"
    plugin: bool = True
    max_batch: Count = 4
    max_length: Count | None = None
    sizes: dict[str, tuple[Count, Count, Count]] = {}
    timing_cache: bool = True
    tf32: bool = False
    refit: bool = False
    strip: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"tensorrt|tensorrt-rtx(:sm\d+(,sm\d+)*)?", self.target):
            raise ConfigError(
                f"target is {self.target!r}, expected tensorrt, tensorrt-rtx or tensorrt-rtx:sm86,sm89",
                hint="tensorrt builds for the GPU at hand; tensorrt-rtx for any, without one.",
            )
        for name, size in self.sizes.items():
            if [*size] != sorted(size):
                raise ConfigError(f"{name} is {size}, expected min, opt and max", hint="As rows=1,16,64.")

    @property
    def library(self) -> str:
        """The library that builds the engine, by its name on PyPI."""
        return self.target.partition(":")[0]

    @property
    def architectures(self) -> tuple[str, ...]:
        """The GPUs to build for, such as "sm89"; none means the one at hand."""
        named = self.target.partition(":")[2]
        return tuple(named.split(",")) if named else ("sm86", "sm89", "sm120") if self.library != "tensorrt" else ()


def usual_length(training_length: int) -> int:
    """Tokens to make room for where nobody says: 16 times the training length, or 8192 where that is less and training
    was not longer.
    """
    return max(training_length, min(16 * training_length, 8192))
