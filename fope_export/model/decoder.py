"""The paper's architecture: a pre-norm decoder with FoPE in every block.

B batch, S sequence (new tokens), P past, T = P + S total, A axes of positions, H query heads, K key-value heads, E
head_dim, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import msgspec
import torch
from torch import Tensor, nn

from fope_export import dtypes
from fope_export.config import ExportConfig, ModelConfig
from fope_export.dtypes import BF16, FP32
from fope_export.errors import ConfigError, ExportError
from fope_export.fope import frequencies
from fope_export.fope.folding import folding_of
from fope_export.fope.rotary import FopeRotary
from fope_export.model.casting import cast_when_used
from fope_export.model.experts import Experts

Cache = list[tuple[Tensor, Tensor]]
"""Rotated keys and values of every layer, each [B, K, P, E]; a static cache has its capacity in place of P."""
DTYPES: dict[str, torch.dtype] = {row.name: getattr(torch, row.precision) for row in dtypes.DTYPES.values()}
"""PyTorch's, by the names that exports have."""
Grow = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(past, new [B, K, S, E], tokens already there int64 [B]) -> present."""


def append(past: Tensor, new: Tensor, written: Tensor) -> Tensor:  # noqa: ARG001
    """The dynamic cache: [B, K, P, E] becomes [B, K, P + S, E]."""
    return torch.cat((past, new), dim=2)


@torch.library.custom_op("fope::write", mutates_args=())
def write(past: Tensor, new: Tensor, written: Tensor) -> Tensor:
    """The static cache: a copy of past [B, K, C, E] with `new` after the tokens `written`. ONNX's TensorScatter."""
    slots = written[:, None] + torch.arange(new.shape[2], device=past.device)
    return past.scatter(2, slots[:, None, :, None].expand(new.shape), new)


@write.register_fake
def _(past: Tensor, new: Tensor, written: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(past)


class Step(NamedTuple):
    """What all layers of one step share."""

    mask: Tensor  # [B, 1, S, T], additive
    position_ids: Tensor  # int64 [B, S] or [A, B, S]
    written: Tensor  # int64 [B], tokens in a static cache
    grow: Grow


class Attention(nn.Module):
    """Causal self-attention over the cache and the new tokens; keys enter the cache rotated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.spectrum.head_dim
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.att_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.rotary = FopeRotary(config.spectrum)
        self.attn_out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.out_bias)

    def forward(self, x: Tensor, step: Step, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        projected = self.att_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = projected.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = self.rotary(self.q_norm(q), self.k_norm(k), step.position_ids)
        keys, values = (
            step.grow(old, new.transpose(1, 2), step.written) for old, new in zip(past, (k, v), strict=True)
        )
        attended = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=step.mask, enable_gqa=self.heads != self.kv_heads
        )
        return self.attn_out(attended.transpose(1, 2).flatten(2)), (keys, values)

    def fold_padding(self) -> None:
        """Leave padded channels unrotated, their constant in what makes q and k (`fope.folding`)."""
        config = folding_of(self.rotary.config).config
        for name, parameter in list(self.named_parameters()):
            module, _, leaf = name.rpartition(".")
            if not parameter.is_meta and (folded := self.folded(name, parameter)) is not parameter:
                setattr(self.get_submodule(module), leaf, nn.Parameter(folded, requires_grad=False))
        self.rotary.config = config

    def folded(self, name: str, parameter: Tensor) -> Tensor:
        """What becomes of its parameter `name` by that; itself where it stays."""
        module, folding = name.partition(".")[0], folding_of(self.rotary.config)
        if module in ("q_norm", "k_norm"):
            return _folded(parameter, folding.channels, folding.scale)
        if module != "att_proj":
            return parameter
        scale = torch.ones_like(folding.scale) if isinstance(self.q_norm, nn.RMSNorm) else folding.scale
        turned, kept = parameter.tensor_split(((self.heads + self.kv_heads) * self.head_dim,))
        return torch.cat((_folded(turned, folding.channels, scale), kept))


def _folded(parameter: Tensor, channels: Tensor, scale: Tensor) -> Tensor:
    """Whole heads of a parameter [heads * E, ...], their channels taken in another order and scaled."""
    heads: Tensor = parameter.detach().unflatten(0, (-1, len(channels)))[:, channels]
    return (heads * scale.view(-1, *[1] * (parameter.dim() - 1))).flatten(0, 1)


class FeedForward(nn.Module):
    """SwiGLU with one fused projection: the first half of its output is gated by the second."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ff_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.ff_out = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.ff_proj(x).chunk(2, dim=-1)
        out: Tensor = self.ff_out(nn.functional.silu(gate) * x)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), which may be a mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ff_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        experts = config.experts
        self.feed_forward = (
            Experts(config.hidden_size, experts) if experts and layer in experts.layers else FeedForward(config)
        )

    def forward(self, x: Tensor, step: Step, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.attention(self.attn_norm(x), step, past)
        x = x + attended
        return x + self.feed_forward(self.ff_norm(x)), present


class Decoder(nn.Module):
    """Token ids in, logits and the grown cache out. Call it with the names of the exported graph's inputs.

    `capacity` makes the cache static: as many slots, written in place of being grown.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.capacity = config, 0
        self._computed: torch.dtype | None = None
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Cache,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Cache]:  # fmt: skip
        """input_ids, position_ids int64 [B, S]; attention_mask int64 [B, T], 0 = padding. Logits are [B, S, V], or
        those of the last `logits_to_keep` tokens where that is not 0. Where the spectrum has A axes, position_ids may
        be [A, B, S]; a token with one position stands there on all.

        Raises ConfigError for positions that are no whole numbers.
        """
        if position_ids.is_floating_point():
            raise ConfigError(
                f"position_ids is {position_ids.dtype}, and a decoder's tokens are counted",
                hint="Give it as int64; a module of your own may have positions in between (export_module).",
            )
        x = self.embed(input_ids)
        step = self.step_of(input_ids, attention_mask, position_ids, x.dtype)
        present: Cache = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            x, grown = layer(x, step, past)
            present.append(grown)
        return self.lm_head(self.norm(x[:, -logits_to_keep:] if logits_to_keep else x)), present

    def step_of(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, dtype: torch.dtype) -> Step:
        """What all layers share of what `forward` is given, where activations are of `dtype`."""
        if self.capacity:
            mask, written = static_mask(attention_mask, input_ids.shape[1], dtype, self.capacity)
            return Step(mask, position_ids, written, write)
        return Step(causal_mask(attention_mask, input_ids.shape[1], dtype), position_ids, input_ids[:, 0], append)

    def empty_cache(self, batch: int) -> Cache:
        """A cache with no past, of the model's dtype and on its device."""
        config = self.config
        shape = batch, config.num_kv_heads, self.capacity, config.spectrum.head_dim
        empty = self.embed.weight.new_zeros(shape, dtype=self.dtype)
        return [(empty, empty)] * config.num_layers

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes: activations, cache and logits."""
        return self._computed or self.embed.weight.dtype

    def computing(self, dtype: torch.dtype) -> Self:
        """A copy on the same weights that computes everything but the angles in `dtype`: while a module runs, its
        weights are cast to that.
        """
        made = self.sharing()
        made._computed = dtype
        cast_when_used(made, dtype)
        return made

    def sharing(self) -> Self:
        """A copy of everything but the weights, which are the same memory; those that it is given are its own."""
        memo: dict[int, Any] = {id(buffer): buffer for buffer in self.buffers()}
        for weight in self.parameters():
            memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        return copy.deepcopy(self, memo)

    def converted(self, config: ExportConfig) -> Self:
        """A decoder with the dtype, frequencies and folding that `config` asks for; the rotation's numbers stay
        float32. This one stays as it is, and weights that do not change are shared with it. Those without numbers, on
        the device "meta", stay so.

        Raises ConfigError where its frequencies cannot be extended, or not that far, where nothing can be folded, or
        where there is one axis of positions and all are asked for; ExportError where the dtype cannot hold a weight.
        """
        made, trained = self.sharing(), self.config.training_length
        if config.extend and config.extend_to:
            if config.extend_to <= trained:
                raise ConfigError(
                    f"extend_to is {config.extend_to}, and training was at {trained} tokens", hint="Ask for more."
                )
            for attention in made.attentions():
                rotary = attention.rotary
                rotary.freq = frequencies.extended(
                    rotary.freq, attention.head_dim, config.extend, original_length=trained, length=config.extend_to
                )
        if config.position_axes and self.config.spectrum.axes == 1:
            raise ConfigError(
                "position_axes: the model's tokens have one position each", hint="Leave out --position-axes."
            )
        if config.fold_padding:
            made._fold_padding()
        dtype = DTYPES[config.dtype]
        for name, weight in made.named_parameters():
            if not (name.endswith("_coef") or weight.is_meta):  # coefficients stay float32
                check_range(name, weight.abs().max(), dtype)
        return made.to(dtype)

    def _fold_padding(self) -> None:
        """Fold every layer's padded channels into its projections; logits stay, the cache becomes another one."""
        for attention in self.attentions():
            attention.fold_padding()
        self.config = msgspec.structs.replace(self.config, spectrum=self.attentions()[0].rotary.config)

    def attentions(self) -> list[Attention]:
        """Every layer's attention, in order."""
        return [module for module in self.modules() if isinstance(module, Attention)]


def check_range(name: str, largest: Tensor, dtype: torch.dtype) -> None:
    """Raises ExportError where `largest`, the largest absolute value of the weight `name`, is infinite in `dtype`."""
    if largest.to(dtype).isinf():
        last = torch.finfo(dtype).max
        raise ExportError(
            f"{name} reaches {largest:.6g}, and {str(dtype).removeprefix('torch.')} ends at {last:.6g}",
            hint=f"Export in {BF16.name}, which has almost float32's range, or in {FP32.name}.",
        )


def causal_mask(attention_mask: Tensor, sequence: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, S, T] for the last `sequence` of T tokens: 0 where a token may look, else very low.

    Low is half of dtype's minimum: finite with any score added, so that a padding row that sees nothing stays finite
    and cannot poison the cache.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    queries = torch.arange(sequence, device=attention_mask.device) + (total - sequence)
    return _additive((keys <= queries[:, None]) & (attention_mask != 0)[:, None, :], dtype)


def static_mask(attention_mask: Tensor, sequence: int, dtype: torch.dtype, capacity: int) -> tuple[Tensor, Tensor]:
    """The same over all C slots of a static cache, [B, 1, S, C], and how many of them each row has written, int64 [B].

    A row's new tokens end at its last 1, wherever that is: attention_mask may be wider than the T tokens, up to C, so
    that all steps can have the same shapes.
    """
    total = attention_mask.shape[1]
    real = attention_mask != 0
    written = (real * torch.arange(1, total + 1, device=real.device)).amax(1).sub(sequence).clamp(min=0)
    keys = torch.arange(capacity, device=real.device)
    queries = written[:, None] + torch.arange(sequence, device=real.device)
    real = nn.functional.pad(attention_mask, (0, capacity - total)) != 0
    return _additive((keys <= queries[:, :, None]) & real[:, None, :], dtype), written


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    lowest = torch.finfo(dtype).min / 2
    zero, hidden = (torch.full((), value, dtype=dtype, device=seen.device) for value in (0.0, lowest))
    return torch.where(seen, zero, hidden)[:, None]
