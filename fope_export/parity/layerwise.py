"""A checkpoint's decoder in PyTorch, a stage at a time with the weights of that stage alone: in float64, in the
arithmetic of a runtime, and in copies that show what rounding does there.

A stage is the embedding, a layer or the head. B rows, S tokens, C hidden channels, V vocabulary.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fope_export.backends.base import Feeds, for_decoder
from fope_export.backends.eager import attention_for
from fope_export.bundle import Bundle
from fope_export.graph.ways import way_of
from fope_export.model.conversion import ConvertedWeights
from fope_export.model.decoder import Block, Decoder
from fope_export.parity.judge import MEMBERS
from fope_export.parity.yardstick import neighbours

Kind = int | str
"""DOUBLE, SINGLE, or the number of a member."""
DOUBLE, SINGLE = "float64", "as the bundle computes"
WIDE = 1024
"""Channels of which one member shows the rounding of a token, which is a mean over its channels."""
ROWS = 1 << 8
"""Of a weight, that are moved at once."""


class Rounded:
    """The weights of linear layers that a bundle has rounded, in order of execution."""

    def __init__(self, bundle: Bundle) -> None:
        row = bundle.manifest.export.quantization
        self._layers = way_of(row).read(bundle.model) if row else iter(())
        self._next = next(self._layers, None)

    def of(self, prefix: str, precision: torch.dtype) -> dict[str, Tensor]:
        """The next, by parameter, as long as their names begin so, in float64: as the file's numbers, or in the
        precision that the file puts them out in.
        """
        taken = {}
        while (layer := self._next) is not None and layer.module.startswith(prefix):
            taken[layer.name] = layer.for_inputs(precision)
            self._next = next(self._layers, None)
        return taken


@dataclass(frozen=True)
class Layerwise:
    """What all stages share."""

    outline: Decoder
    """Of the checkpoint, converted as it was exported."""
    weights: ConvertedWeights
    rounded: Rounded
    feeds: Feeds
    arithmetic: torch.dtype
    """That the runtime computes in."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Their names, in order."""
        return ("embed", *(f"layers.{i}" for i in range(self.outline.config.num_layers)), "logits")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Who computes each stage: members are few where each shows much."""
        return DOUBLE, SINGLE, *range(1 if self.outline.config.hidden_size >= WIDE else MEMBERS)

    def dtype(self, kind: Kind) -> torch.dtype:
        return torch.float64 if kind == DOUBLE else self.arithmetic

    def run(self, number: int, given: Mapping[Kind, Tensor]) -> dict[Kind, Tensor]:
        """What every kind gives in the stage `number` for token ids [B, S] or its activations [B, S, C]; logits
        [B, S, V] in the last. Stages are run in order.
        """
        if number == 0:
            return self._embedded(given)
        name = self.stages[number]
        if name == "logits":
            return self._logits(given)
        rounded = self.rounded.of(f"{name}.", self.arithmetic)
        return {kind: self._layer(number, rounded, kind, x) for kind, x in given.items()}

    def _embedded(self, given: Mapping[Kind, Tensor]) -> dict[Kind, Tensor]:
        rows = self.weights.rows("embed.weight", given[DOUBLE])
        return {kind: self._placed([rows], rows.shape, kind, 0) for kind in given}

    def _layer(self, number: int, rounded: Mapping[str, Tensor], kind: Kind, x: Tensor) -> Tensor:
        name, config = self.stages[number], self.outline.config
        block = copy.deepcopy(self.outline.get_submodule(name))
        assert isinstance(block, Block)
        for i, (inner, parameter) in enumerate(list(block.named_parameters())):
            if ".rotary." not in inner:
                module, _, leaf = inner.rpartition(".")
                pieces = self._pieces(f"{name}.{inner}", parameter, rounded)
                placed = self._placed(pieces, parameter.shape, kind, number << 16 | i)
                setattr(block.get_submodule(module), leaf, nn.Parameter(placed, requires_grad=False))
        if kind != DOUBLE:
            for inner, norm in list(block.named_modules()):
                if isinstance(norm, nn.RMSNorm):
                    block.set_submodule(inner, OneByOne(norm.weight, norm.eps))
        ids, mask, positions = map(torch.from_numpy, for_decoder(self.feeds, config.spectrum.axes))
        step = self.outline.step_of(ids, mask, positions, self.dtype(kind))
        empty = x.new_zeros(len(x), config.num_kv_heads, self.outline.capacity, config.spectrum.head_dim)
        with attention_for(x):
            out: Tensor = block(x, step, (empty, empty))[0]
        return out

    def _logits(self, given: Mapping[Kind, Tensor]) -> dict[Kind, Tensor]:
        rounded, norm = self.rounded.of("lm_head", self.arithmetic), self.outline.norm
        normed, found = {}, {kind: list[Tensor]() for kind in given}
        for kind, x in given.items():
            scale = self._placed([norm.weight.detach()], norm.weight.shape, kind, 1)
            exact = kind == DOUBLE
            normed[kind] = (
                nn.functional.rms_norm(x, scale.shape, scale, norm.eps) if exact else OneByOne(scale, norm.eps)(x)
            )
        for i, piece in enumerate(self._pieces("lm_head.weight", self.outline.lm_head.weight, rounded), start=2):
            for kind, x in normed.items():
                found[kind].append(nn.functional.linear(x, self._placed([piece], piece.shape, kind, i)))
        return {kind: torch.cat(parts, dim=-1) for kind, parts in found.items()}

    def _pieces(self, name: str, parameter: Tensor, rounded: Mapping[str, Tensor]) -> Iterable[Tensor]:
        if name in rounded:
            return [rounded[name]]
        return self.weights.pieces(name) if parameter.is_meta else [parameter.detach()]

    def _placed(self, pieces: Iterable[Tensor], shape: torch.Size, kind: Kind, seed: int) -> Tensor:
        """A weight as `kind` has it: members have some of its numbers moved by one unit in the last place."""
        whole, start = torch.empty(shape, dtype=self.dtype(kind)), 0
        for piece in pieces:
            whole[start : start + len(piece)] = piece
            start += len(piece)
        if isinstance(kind, int):
            generator = torch.Generator().manual_seed(kind << 32 | seed)
            for part in whole.split(ROWS):
                part.copy_(neighbours(part.clone(), generator))
        return whole


class OneByOne(nn.Module):
    """An RMSNorm that adds squares [..., C] one after the other in float32, the order that rounds most, and ONNX
    Runtime's: where numbers are of about one size, each addition may be off to the same side.
    """

    def __init__(self, weight: Tensor, eps: float | None) -> None:
        super().__init__()
        self.weight, self._eps = weight, eps or 0.0

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        total = np.add.accumulate(wide.square().numpy(), axis=-1, dtype=np.float32)[..., -1:]
        scale = torch.from_numpy(total).div(x.shape[-1]).add(self._eps).rsqrt()
        return (wide * scale).to(x.dtype) * self.weight


def doubled(feeds: Feeds) -> Feeds:
    """Every row twice, the second ones after the first."""
    return Feeds(*(np.concatenate((array, array)) for array in feeds))
