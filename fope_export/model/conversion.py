"""The weights of a checkpoint as an export has them, made one at a time when they are written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fope_export.config import ExportConfig
from fope_export.model.checkpoint import ROTARY, Checkpoint
from fope_export.model.decoder import DTYPES, Attention, Decoder, check_range

ATTENTION = ".attention."


@dataclass(frozen=True)
class ConvertedWeights:
    """What `Decoder.converted` makes of the weights of `source`, without a decoder that has them all. The rotation's
    own numbers are those of the converted `Checkpoint.outline`.
    """

    source: Checkpoint
    config: ExportConfig

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The weight `name` in the dtype of the export, in pieces along its first axis, one at a time.

        Raises CheckpointError where it is not finite, and ExportError where the dtype cannot hold it.
        """
        dtype = DTYPES[self.config.dtype]
        for piece in self._pieces(name):
            if dtype != piece.dtype and piece.numel() and piece.abs().max().to(dtype).isinf():
                largest = torch.stack([each.abs().max() for each in self._pieces(name) if each.numel()]).max()
                check_range(name, largest.float(), dtype)
            yield piece.to(dtype)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """The rows `ids` [...] of the weight `name` [V, C], as [..., C]. Raises as `pieces`."""
        found, start = (
            torch.empty(*ids.shape, *self.source.weights.shapes[name][1:], dtype=DTYPES[self.config.dtype]),
            0,
        )
        for piece in self.pieces(name):
            here = (ids >= start) & (ids < start + len(piece))
            found[here] = piece[ids[here] - start]
            start += len(piece)
        return found

    def decoder(self, make: Callable[[torch.Size, torch.dtype], Tensor], dtype: torch.dtype | None = None) -> Decoder:
        """The same decoder as `Decoder.converted` makes, its weights then in `dtype` where that is wider. Matrices that
        are so in a file are that file's memory; `make` gives that of the others.

        Raises as `Decoder.converted` and `pieces` do.
        """
        made = self.source.outline.converted(self.config).to(dtype or DTYPES[self.config.dtype])
        lacking = {name: weight for name, weight in made.named_parameters() if weight.is_meta}
        made.load_state_dict(
            {name: self._whole(name, weight, make) for name, weight in lacking.items()}, assign=True, strict=False
        )
        if self.source.config.tie_embeddings:
            made.lm_head.weight = made.embed.weight
        return made.eval().requires_grad_(False)

    def _whole(self, name: str, like: Tensor, make: Callable[[torch.Size, torch.dtype], Tensor]) -> Tensor:
        stored = None if self._folds(name) else self.source.weights.as_stored(name)
        if stored is not None and stored.dtype == like.dtype == DTYPES[self.config.dtype]:
            for _ in self.pieces(name):  # which checks them
                pass
            return stored
        whole, start = make(like.shape, like.dtype), 0
        for piece in self.pieces(name):
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return whole

    def _folds(self, name: str) -> bool:
        return self.config.fold_padding and ATTENTION in name and ROTARY not in name

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """As they are stored; in float32, folded, where that is asked for."""
        weights = self.source.weights
        if self.source.config.tie_embeddings and name == "lm_head.weight":
            name = "embed.weight"
        if self._folds(name):
            layer, _, parameter = name.partition(ATTENTION)
            attention = self.source.outline.get_submodule(layer + ATTENTION.rstrip("."))
            assert isinstance(attention, Attention)
            yield attention.folded(parameter, weights.whole(name))
        else:
            yield from weights.pieces(name)
