"""The checkpoint in PyTorch, as fast as torch.compile makes it."""

import numpy as np
import torch
from torch import Tensor

from fope_export.backends.base import CHUNK, Ids, Logits
from fope_export.backends.eager import in_numpy
from fope_export.benchmark.greedy import Greedy
from fope_export.fope.rotary import rotated
from fope_export.model.decoder import Cache, Decoder, Step, static_mask


def write_in_place(past: Tensor, new: Tensor, written: Tensor) -> Tensor:
    """The static cache for rows of equal length: past [B, K, C, E] itself, with `new` after the tokens `written`."""
    return past.index_copy_(2, written[0] + torch.arange(new.shape[2], device=past.device), new)


class Compiled(Greedy):
    """torch.compile with a static cache that is written in place: a graph for each shape, made when the shape first
    comes. The rotation is compiled with the rest. On a GPU `cuda_graph` lets it record what it compiled
    (mode "reduce-overhead"), which needs caches that stay where they are.
    """

    def __init__(self, model: Decoder, *, cuda_graph: bool = False) -> None:
        self._model, self._device = model, model.embed.weight.device
        self._caches: dict[tuple[int, ...], Cache] = {}
        for attention in model.attentions():
            attention.rotary.operator = rotated
        torch._dynamo.config.recompile_limit = 64  # a graph for each shape is meant
        mode = "reduce-overhead" if cuda_graph else "default"
        self._step = torch.compile(self._forward, dynamic=False, fullgraph=True, mode=mode)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        model = self._model
        x = model.embed(ids)
        visible, written = static_mask(mask, ids.shape[1], x.dtype, mask.shape[1])
        step = Step(visible, positions, written, write_in_place)
        for layer, past in zip(model.layers, cache, strict=True):
            x, _ = layer(x, step, past)
        logits: Tensor = model.lm_head(model.norm(x[:, -1]))
        return logits

    def begin(self, prompts: Ids, new: int) -> Logits:
        (batch, length), config = prompts.shape, self._model.config
        self._length, self._mask = 0, torch.zeros(batch, length + new, dtype=torch.int64, device=self._device)
        shape = (batch, config.num_kv_heads, length + new, config.spectrum.head_dim)
        if shape not in self._caches:
            self._caches[shape] = [(self._zeros(shape), self._zeros(shape)) for _ in range(config.num_layers)]
        self._cache = self._caches[shape]  # what an earlier prompt left in it is masked, and overwritten
        for start in range(0, length, CHUNK):
            logits = self._advance(prompts[:, start : start + CHUNK])
        return logits

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        zeros = self._model.embed.weight.new_zeros(shape)
        torch._dynamo.mark_static_address(zeros)
        return zeros

    def feed(self, tokens: Ids) -> Logits:
        return self._advance(tokens[:, None])

    @torch.inference_mode()
    def _advance(self, ids: Ids) -> Logits:
        start, self._length = self._length, self._length + ids.shape[1]
        self._mask[:, start : self._length] = 1
        positions = torch.arange(start, self._length, device=self._device).repeat(len(ids), 1)
        tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(self._device)
        return in_numpy(self._step(tokens, self._mask, positions, self._cache))
