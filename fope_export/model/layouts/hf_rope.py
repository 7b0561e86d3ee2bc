"""What `rope_scaling` and `rope_parameters` of a config.json say about positions: FoPE as Intern-S1-Pro, xtuner,
LMDeploy, vLLM and SGLang write it, RoPE as transformers does.

Fields, defaults and the order of operations follow modeling_rope_utils.py and modeling_interns1_pro.py of Intern-S1-Pro
and xtuner/v1/module/rope/rope.py (github.com/InternLM/xtuner, b934f46): frequencies are scaled first and floored then,
and the scale of attention multiplies sine and cosine after they were padded.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from torch import Tensor

from fope_export.config import Checked, Count, Positive, SpectrumConfig, convert
from fope_export.errors import ConfigError
from fope_export.fope import frequencies
from fope_export.fope.spectrum import Spectrum
from fope_export.model.layouts.base import Positions, without_clashes

FOPE_FIELDS = ("fope_init_factor", "fope_sep_head", "num_inv_freq")
"""Any of these that is not null makes a model's position embedding FoPE."""
TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "fope": (),  # LMDeploy's name of a default type with FoPE
    "linear": ("factor",),
    "yarn": ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""rope_type -> the fields that it reads beside original_max_position_embeddings."""
ALIASES = {"mrope": "default", "qwen3_vl": "default"}
"""Types whose axes are another field's matter (mrope_section); those of "qwen3_vl" take turns."""
RENAMED = {"type": "rope_type", "fope_num_inv_freq": "num_inv_freq"}
"""Names in older versions of transformers, and in LMDeploy."""
SPLIT = (
    "Only fope_sep_head is given: Intern-S1-Pro's own code then keeps all {all} frequencies, and xtuner, LMDeploy, "
    "vLLM and SGLang keep the {kept} above the floor. The weights have neither number."
)


class Rope(Checked, frozen=True, kw_only=True):
    """Everything that the two dictionaries may say, nulls being absent."""

    rope_theta: Positive
    rope_type: str = "default"
    fope_init_factor: float | None = None
    fope_sep_head: bool | None = None
    num_inv_freq: Count | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    attention_factor: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    truncate: bool | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    mrope_section: list[Count] | None = None
    mrope_interleaved: bool | None = None
    partial_rotary_factor: float | None = None
    max_position_embeddings: Count | None = None

    @property
    def fope(self) -> bool:
        return self.rope_type == "fope" or any(getattr(self, name) is not None for name in FOPE_FIELDS)

    @property
    def floors_unless_it_is_interns(self) -> bool:
        """Whether implementations differ: Intern-S1-Pro's asks for fields, misspells one, and then floors nothing."""
        alone = self.fope_sep_head is not None and self.fope_init_factor is None and self.num_inv_freq is None
        return alone and self.rope_type != "fope"

    @property
    def scaled(self) -> str:
        return "" if not TYPES[self.rope_type] else f", {self.rope_type} before the floor"

    def attention_scale(self) -> float:
        """What multiplies sine and cosine: YARN's (arXiv 2309.00071, Eq. 22)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
        return self._scale(1.0)

    def _scale(self, weight: float) -> float:
        assert self.factor is not None
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0


def rope_of(
    parameters: Mapping[str, Any] | None, scaling: Mapping[str, Any] | None, beside: Mapping[str, Any], where: str
) -> Rope:
    """One description out of all places where Hugging Face's versions keep it; `beside` are those outside of both.

    Raises ConfigError where two of them say different things, or a field is unknown.
    """
    given: dict[str, Any] = {}
    for name, value in (*_said(parameters), *_said(scaling), *beside.items()):
        if value is not None and given.setdefault(name, value) != value:
            raise ConfigError(
                f"{name} is {given[name]!r} and {value!r}", hint="Two fields say it: keep the one that training used."
            )
    kind = given.get("rope_type", "default")
    given["rope_type"] = ALIASES.get(kind, kind)
    if kind == "qwen3_vl":
        given.setdefault("mrope_interleaved", True)
    return convert(given, Rope, where=f"{where}: rope_parameters")


def _said(given: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """Names and values, of the layers with full attention where there are dictionaries for kinds of layers."""
    given = given or {}
    if given and all(isinstance(value, Mapping) for value in given.values()):
        given = given.get("full_attention", {})
    for name, value in given.items():
        yield RENAMED.get(name, name), value


def check(rope: Rope, head_dim: int, turns: Sequence[int] = ()) -> None:
    """Raises ConfigError naming the first field, or pair of fields, that no implementation defines; `turns` are the
    sections of a model type whose axes take turns.
    """
    kind, known = rope.rope_type, sorted(TYPES)
    if kind not in TYPES:
        raise ConfigError(
            f"rope_type is {kind!r}, and only {', '.join(map(repr, known[:-1]))} and {known[-1]!r} are supported",
            hint="Frequencies that change with the length of a text are no graph's."
            if kind in ("dynamic", "longrope")
            else "Open an issue with the config.",
        )
    read = {*TYPES[kind]}
    unread = {name for names in TYPES.values() for name in names} - read - {"factor", "truncate"}
    given = [name for name in sorted(unread) if getattr(rope, name) is not None]
    section = rope.mrope_section or []
    without_clashes(
        {
            f"factor is {rope.factor} with rope_type {kind!r}": not TYPES[kind] and rope.factor not in (None, 1.0),
            f"rope_type {kind!r} needs a factor": "factor" in read and rope.factor is None,
            f"{given[0] if given else None} is given, and rope_type {kind!r} does not read it": given,
            "rope_type 'llama3' needs low_freq_factor, high_freq_factor and original_max_position_embeddings": kind
            == "llama3"
            and None in (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings),
            "low_freq_factor is not below high_freq_factor": kind == "llama3"
            and (rope.low_freq_factor or 0) >= (rope.high_freq_factor or 0),
            "yarn needs a rope_theta above 1": kind == "yarn" and rope.rope_theta <= 1,
            f"partial_rotary_factor is {rope.partial_rotary_factor}, and only 1.0 is supported": (
                rope.partial_rotary_factor not in (None, 1.0)
            ),
            f"mrope_section has {sum(section)} frequencies, and a head has {head_dim // 2}": section
            and sum(section) != head_dim // 2,
            "mrope_interleaved is false in a model type whose code has the axes take turns": turns
            and rope.mrope_interleaved is False,
        }
    )


def positions(
    rope: Rope, *, head_dim: int, groups: int, length: int, stored: int | None = None, turns: Sequence[int] = ()
) -> Positions:
    """The position embedding of every layer: `length` is that of training, `stored` the weights' D where known, `turns`
    as for `check`.
    """
    freq, scale = _scaled(rope, head_dim, length), rope.attention_scale()
    if not rope.fope:
        whole = Spectrum.rope(freq.numpy(), head_dim, scale=scale)
        axes = _axes(rope, turns, len(freq), len(whole.freq))
        config = msgspec.structs.replace(whole.config, full_precision=False, **axes)
        return Positions(config, freq, freq, whole=whole, reading={"read as": f"transformers' RoPE{rope.scaled}"})
    # The paper's code keeps a frequency of exactly one period, Intern-S1-Pro's does not.
    kept = freq[freq > 2 * math.pi / length] if rope.num_inv_freq is None else freq[: rope.num_inv_freq]
    split, reading = "", "Intern-S1-Pro, xtuner, LMDeploy, vLLM and SGLang"
    if rope.floors_unless_it_is_interns and len(kept) < len(freq):
        split, reading = SPLIT.format(all=len(freq), kept=len(kept)), "xtuner, LMDeploy, vLLM and SGLang"
        if stored == len(freq):
            kept, reading = freq, "Intern-S1-Pro's own code, which floors nothing for fope_sep_head alone"
    config = SpectrumConfig(
        head_dim=head_dim,
        rotary_dim=head_dim,
        frequencies=len(kept),
        pairs=len(kept),
        groups=groups if rope.fope_sep_head else 1,
        sin_pad=scale,
        cos_pad=scale,
        sign=1,
        pairing="half",
        full_precision=False,
        **_axes(rope, turns, len(freq), len(kept)),
    )

    def adapt(coef: Tensor) -> Tensor:
        coef = coef if rope.fope_sep_head else coef[None]
        return coef if scale == 1 else coef * scale

    return Positions(
        config,
        kept,
        kept,
        adapt=adapt,
        split=split,
        reading={"read as": reading + rope.scaled, "normalization": "none"},
    )


def _axes(rope: Rope, turns: Sequence[int], count: int, kept: int) -> dict[str, Any]:
    """What a spectrum's configuration says of axes, for the first `kept` of a head's `count` frequencies: they take
    turns as in Qwen3-VL, or have sections as in Qwen2-VL. A frequency has the same axis whether or not others are
    floored.
    """
    sections = rope.mrope_section or turns
    if len(sections) < 2:
        return {}
    by_turns = turns or rope.mrope_interleaved
    axis = frequencies.axis_by_turns(sections, count) if by_turns else frequencies.axis_in_sections(sections)
    return {"axes": len(sections), "axis": axis[:kept]}


def _scaled(rope: Rope, head_dim: int, length: int) -> Tensor:
    """float32 [head_dim / 2], every frequency before any floor."""
    freq = frequencies.exponential(rope.rope_theta, head_dim)
    factor, original = rope.factor or 1.0, rope.original_max_position_embeddings
    match rope.rope_type:
        case "yarn":
            truncate = True if rope.truncate is None else rope.truncate
            return frequencies.yarn(
                freq, head_dim, rope.rope_theta, scale=factor, original_length=original or length,
                beta_fast=rope.beta_fast or 32.0, beta_slow=rope.beta_slow or 1.0, truncate=truncate,
            )  # fmt: skip
        case "llama3":
            assert rope.low_freq_factor and rope.high_freq_factor and original
            return frequencies.llama3(
                freq, factor, low=rope.low_freq_factor, high=rope.high_freq_factor, original_length=original
            )
    return freq / factor
