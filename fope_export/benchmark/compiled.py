"""The checkpoint in PyTorch, as fast as eager and torch.compile make it."""

import torch
from torch import Tensor, nn

from fope_export.backends.base import Ids, feeds_for
from fope_export.fope.rotary import rotated
from fope_export.generation import CHUNK
from fope_export.model.decoder import Cache, Decoder, Step, static_mask


class LastPosition(nn.Module):
    """A head that computes the last position's logits only: [B, S, hidden] to [B, 1, V]."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x[:, -1:])
        return logits


def write_in_place(past: Tensor, new: Tensor, written: Tensor) -> Tensor:
    """The static cache for rows of equal length: past [B, K, C, E] itself, with `new` after the tokens `written`."""
    return past.index_copy_(2, written[0] + torch.arange(new.shape[2]), new)


class Compiled:
    """torch.compile, in its default mode with a static cache that is written in place: a graph for each shape, made
    when the shape first comes. The rotation is compiled with the rest, and the likeliest token is taken inside.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        for attention in model.attentions():
            attention.rotary.operator = rotated
        torch._dynamo.config.recompile_limit = 64  # a graph for each shape is meant
        self._step = torch.compile(self._forward, dynamic=False, fullgraph=True)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        model = self._model
        x = model.embed(ids)
        visible, written = static_mask(mask, ids.shape[1], x.dtype, mask.shape[1])
        step = Step(visible, positions, written, write_in_place)
        for layer, past in zip(model.layers, cache, strict=True):
            x, _ = layer(x, step, past)
        tokens: Tensor = model.lm_head(model.norm(x[:, -1:])).argmax(-1)
        return tokens

    def first(self, prompts: Ids, new: int) -> Ids:
        """See `Contender`."""
        batch, length = prompts.shape
        config = self._model.config
        self._mask = torch.zeros(batch, length + new, dtype=torch.int64)
        shape = (batch, config.num_kv_heads, length + new, config.spectrum.head_dim)
        zeros = self._model.embed.weight.new_zeros
        self._cache = [(zeros(shape), zeros(shape)) for _ in range(config.num_layers)]
        self._length = 0
        feeds = feeds_for(prompts)
        for start in range(0, length, CHUNK):
            tokens = self._advance(torch.from_numpy(feeds.part(start, start + CHUNK).input_ids))
        return tokens

    def next(self) -> Ids:
        """See `Contender`."""
        return self._advance(self._tokens)

    @torch.inference_mode()
    def _advance(self, ids: Tensor) -> Ids:
        start, self._length = self._length, self._length + ids.shape[1]
        self._mask[:, start : self._length] = 1
        positions = torch.arange(start, self._length).expand(ids.shape[0], -1)
        self._tokens = self._step(ids, self._mask, positions, self._cache)
        tokens: Ids = self._tokens[:, -1].numpy()
        return tokens
