"""The rotation in torch: one registered operator that computes, differentiates and traces, and its drop-in module.

B batch, S sequence, A axes of positions, H query heads, K key-value heads, E head_dim, R rotary_dim, D kept
frequencies, J rows of coefficients, F rotated pairs, G coefficient groups.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fope_export.config import SpectrumConfig
from fope_export.errors import ConfigError
from fope_export.fope import contract, frequencies
from fope_export.fope.initialize import initial_coefficients
from fope_export.fope.spectrum import Spectrum


def rotated(
    q: Tensor, k: Tensor, position_ids: Tensor, freq: Tensor, sin_coef: Tensor, cos_coef: Tensor, axis: Tensor | None,
    sin_pad: float, cos_pad: float, sign: float, interleaved: bool, rotary_dim: int, full_precision: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate q [B, S, H, E] and k [B, S, K, E] as `contract` says; the results have their shapes and dtypes.
    position_ids are [B, S], or [A, B, S] where there is an `axis`.

    Angles and series are float32 (float64 for float64 inputs, of the same float32 angles); so is the rotation with
    `full_precision`. Differentiable in q, k, sin_coef and cos_coef.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    bases = _bases(position_ids, freq, axis, sin_coef, wide)
    sin, cos = _tables(bases, (sin_coef, cos_coef), (sin_pad, cos_pad), sign, rotary_dim // 2)
    dtype = wide if full_precision else q.dtype
    sin, cos = sin.to(dtype), cos.to(dtype)
    q_rotated, k_rotated = (_turn(x, sin, cos, interleaved) for x in (q, k))
    return q_rotated, k_rotated


rotary = torch.library.custom_op(contract.TORCH_NAME, rotated, mutates_args=())


@rotary.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _bases(
    position_ids: Tensor, freq: Tensor, axis: Tensor | None, coef: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What sine and cosine are mixtures of by coefficients [G, J, F], each [B, S, J]. The angle is a float32 product by
    definition, whatever `dtype` is.
    """
    positions = position_ids.to(torch.float32)
    each = positions[..., None] if axis is None else positions[axis].permute(1, 2, 0)
    angles = (each * freq).to(dtype)
    sines, cosines = angles.sin(), angles.cos()
    if coef.shape[1] == len(freq):
        return sines, cosines
    both = torch.cat((sines, cosines), dim=-1)
    return both, both


def _tables(
    bases: tuple[Tensor, Tensor], coefs: tuple[Tensor, Tensor], pads: tuple[float, float], sign: float, half: int
) -> tuple[Tensor, Tensor]:
    """sign * S and C of the definition, each [B, S, G, R / 2]."""
    groups, count, pairs = coefs[0].shape
    tables = []
    for basis, coef, pad in zip(bases, coefs, pads, strict=True):
        flat = coef.to(basis.dtype).transpose(0, 1).reshape(count, groups * pairs)
        table = (basis @ flat).unflatten(-1, (groups, pairs))
        tables.append(nn.functional.pad(table, (0, half - pairs), value=pad))
    return (tables[0] if sign == 1 else tables[0] * sign), tables[1]


def _split(x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two channels of every pair of x [B, S, H, R], each [B, S, G, H / G, R / 2]."""
    grouped = x.unflatten(2, (groups, -1))
    if interleaved:
        return grouped[..., 0::2], grouped[..., 1::2]
    left, right = grouped.chunk(2, dim=-1)
    return left, right


def _turn(x: Tensor, sin: Tensor, cos: Tensor, interleaved: bool) -> Tensor:
    rotary_dim = 2 * sin.shape[-1]
    left, right = _split(x[..., :rotary_dim].to(sin.dtype), sin.shape[2], interleaved)
    sin, cos = sin.unsqueeze(3), cos.unsqueeze(3)
    pair = (left * cos - right * sin, right * cos + left * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.flatten(2, 3).to(x.dtype), x[..., rotary_dim:]), dim=-1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    tensors = len(contract.INPUTS[contract.GENERAL])
    ctx.save_for_backward(*inputs[:tensors])
    ctx.settings = dict(zip(contract.SETTINGS, inputs[tensors:], strict=True))


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    """The rotation's transpose turns the other way; a coefficient collects its basis times the pairs it mixed into."""
    q, k, position_ids, freq, sin_coef, cos_coef, axis = ctx.saved_tensors
    sign, interleaved, rotary_dim = (ctx.settings[name] for name in ("sign", "interleaved", "rotary_dim"))
    other_way = ctx.settings | {"sign": -sign}
    back = rotary(dq, dk, position_ids, freq, sin_coef, cos_coef, axis, *other_way.values())
    dsin, dcos = None, None
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        wide = torch.promote_types(q.dtype, torch.float32)
        groups, _, pairs = sin_coef.shape
        by_sin = by_cos = sin_coef.new_zeros((), dtype=wide)
        for x, grad in ((q, dq), (k, dk)):
            (left, right), (dleft, dright) = (
                (half[..., :pairs].to(wide) for half in _split(t[..., :rotary_dim], groups, interleaved))
                for t in (x, grad)
            )
            by_sin = by_sin + (dright * left - dleft * right).sum(3) * sign
            by_cos = by_cos + (dleft * left + dright * right).sum(3)
        bases = _bases(position_ids, freq, axis, sin_coef, wide)
        dsin, dcos = (
            torch.einsum("bsj,bsgf->gjf", basis, by).to(sin_coef.dtype)
            for basis, by in zip(bases, (by_sin, by_cos), strict=True)
        )
    return *back, None, None, dsin, dcos, None, *[None] * len(contract.SETTINGS)


rotary.register_autograd(_backward, setup_context=_save)


class FopeRotary(nn.Module):
    """FoPE for any attention, in the place where RoPE stands: `q, k = rotary(q, k, position_ids)`.

    q [B, S, H, head_dim], k [B, S, K, head_dim], position_ids [B, S], or [A, B, S] where a token has A positions; int64
    or, for positions between the whole ones, float32. Its numbers stay float32 when the model around them is cast.
    Construct it with `create` to train, or from a checkpoint's spectrum with `from_spectrum`.

    `learnable` trains the coefficients (the paper freezes them); `normalize` divides them by their sum over D.

    >>> import fope_export as fx, torch
    >>> rotary = fx.FopeRotary.create(head_dim=16, groups=2, training_length=64)
    >>> q, k = rotary(torch.rand(1, 5, 4, 16), torch.rand(1, 5, 2, 16), torch.arange(5)[None])
    >>> q.shape, k.shape
    (torch.Size([1, 5, 4, 16]), torch.Size([1, 5, 2, 16]))
    """

    freq: Tensor
    axis: Tensor | None
    operator = staticmethod(rotary)
    """What turns. To a compiler it is opaque; one that is to see inside takes `rotated`."""

    def __init__(self, config: SpectrumConfig, *, learnable: bool = False, normalize: bool = False) -> None:
        super().__init__()
        self.config, self.normalize = config, normalize
        shape = (config.groups, config.rows, config.pairs)
        self.register_buffer("freq", torch.zeros(config.frequencies))
        axis = torch.tensor(config.axis, dtype=torch.int64, device="cpu") if config.axes > 1 else None
        self.register_buffer("axis", axis, persistent=False)  # the configuration says it
        self.sin_coef = nn.Parameter(torch.zeros(shape), requires_grad=learnable)
        self.cos_coef = nn.Parameter(torch.zeros(shape), requires_grad=learnable)

    @classmethod
    def create(
        cls, *, head_dim: int, groups: int, training_length: int, theta: float = 10_000.0,
        init: str = "eye_xavier_norm", gain: float = 0.3, pairing: str = "half",
        sections: Sequence[int] = (), bases: int = 1,
        learnable: bool = False, normalize: bool = False, generator: torch.Generator | None = None,
    ) -> Self:  # fmt: skip
        """A fresh FoPE as the authors start it, for `groups` key-value heads with coefficients of their own (1: all
        share them) and training on sequences of `training_length` tokens.

        Of the frequencies theta ** (-2i / head_dim) it keeps the D that complete a period in `training_length`, and
        rotates F = min(D, head_dim / 4) pairs of channels. `init` names how coefficients are drawn, from `generator`,
        and `gain` how far from those of RoPE; `pairing` is as for `Spectrum.rope`. Where tokens have several positions
        (of an image: time, height, width), `sections` says how often each of these axes has its turn among a head's
        frequencies (mrope_section of Qwen3-VL). With `bases` 2 each series is a mixture of sines and cosines, and
        begins as one of the first kind.

        Raises ConfigError for an unknown `init`, or where nothing is left to rotate.
        """
        freq = frequencies.floor_to_zero(frequencies.exponential(theta, head_dim), training_length)
        axis, freq = frequencies.axis_by_turns(sections, len(freq)), freq[freq != 0]
        shape = (groups, len(freq), min(len(freq), head_dim // 4))
        if not all(shape):
            raise ConfigError(
                f"no pair of head_dim {head_dim} completes a period in {training_length} tokens",
                hint="Train on longer sequences, or with more channels a head.",
            )
        sin_coef, cos_coef = (initial_coefficients(shape, init, gain, generator) for _ in range(2))
        more = (bases - 1) * len(freq)
        sin_coef, cos_coef = nn.functional.pad(sin_coef, (0, 0, 0, more)), nn.functional.pad(cos_coef, (0, 0, more, 0))
        extended = {"axes": len(sections), "axis": axis[: len(freq)]} if len(sections) > 1 else {}
        fields: dict[str, Any] = {"pairing": pairing, "bases": bases} | extended
        spectrum = Spectrum.fope(freq.numpy(), sin_coef.numpy(), cos_coef.numpy(), head_dim, **fields)
        return cls.from_spectrum(spectrum, learnable=learnable, normalize=normalize)

    @classmethod
    def from_spectrum(cls, spectrum: Spectrum, *, learnable: bool = False, normalize: bool = False) -> Self:
        """The module that rotates as `spectrum` says, with its own copy of the numbers; `learnable` and `normalize` are
        as for the class.
        """
        module = cls(spectrum.config, learnable=learnable, normalize=normalize)
        with torch.no_grad():
            for port in contract.NUMBERS:
                getattr(module, port.name).copy_(torch.from_numpy(getattr(spectrum, port.name)))
        return module

    @property
    def spectrum(self) -> Spectrum:
        """The canonical spectrum it stands for now, normalization applied; a copy of the numbers."""
        return Spectrum(self.config, *(t.detach().cpu().numpy().copy() for t in (self.freq, *self._coefficients())))

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        if not self.normalize:
            return self.sin_coef, self.cos_coef
        return normalized(self.sin_coef), normalized(self.cos_coef)

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Queries q [B, S, H, head_dim] and keys k [B, S, K, head_dim], turned to their positions [B, S] or [A, B, S];
        in their shapes and dtypes. Groups of coefficients divide K, and K divides H. A token with one position stands
        there on every axis, and turns as it would with plain FoPE.

        Raises ConfigError for positions on other axes than the spectrum has, for rounded and for learnt ones.
        """
        self._check(position_ids)
        axis = self.axis if position_ids.ndim == 3 else None
        numbers = self.freq, *self._coefficients(), axis
        told = contract.settings(self.config).values()
        turned: tuple[Tensor, Tensor] = self.operator(q, k, position_ids, *numbers, *told)
        return turned

    def _check(self, position_ids: Tensor) -> None:
        if position_ids.ndim == 3 and (self.axis is None or len(position_ids) != self.config.axes):
            raise ConfigError(
                f"position_ids has {len(position_ids)} axes, and the spectrum has {self.config.axes}",
                hint="Give them as [batch, sequence], or as [axes, batch, sequence] where a spectrum has several.",
            )
        if position_ids.dtype in (torch.float16, torch.bfloat16):
            raise ConfigError(
                f"position_ids is {position_ids.dtype}, which rounds positions", hint="Give it as int64 or float32."
            )
        if position_ids.requires_grad:
            raise ConfigError("positions take no gradient", hint="Give position_ids.detach(); q and k have theirs.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, never to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def normalized(coef: Tensor) -> Tensor:
    """Coefficients [..., D, F] divided by their sum over D (`fourier_norm` of the authors' code)."""
    return coef / coef.sum(dim=-2, keepdim=True)
