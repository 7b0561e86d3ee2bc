"""Validation of a bundle layer by layer, for models that are larger than memory: one stage at a time, on the same
activations, with the weights of that stage alone.

A stage is the embedding, a layer, or the head. B rows, S tokens, C hidden channels.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fope_export.backends.base import Feeds, feeds_for
from fope_export.backends.choose import BACKENDS
from fope_export.backends.eager import attention_for, in_numpy
from fope_export.bundle import Bundle
from fope_export.graph.ways import way_of
from fope_export.model.checkpoint import Checkpoint, source_of
from fope_export.model.conversion import ConvertedWeights
from fope_export.model.decoder import Block, Decoder
from fope_export.onnx_files import check_graphs
from fope_export.parity.cases import graph_feeds
from fope_export.parity.judge import MEMBERS, Noise, over
from fope_export.parity.localize import LIMITS
from fope_export.parity.parts import Parts
from fope_export.parity.quantized import allowance_of
from fope_export.parity.run import contradictions
from fope_export.parity.yardstick import neighbours

Floats = NDArray[np.floating[Any]]
ROWS, TOKENS = 2, 32
"""Of the random sequences that go through the stages: as many tokens as make a mean (`judge.ENOUGH`)."""
WIDE, FEW = 1024, 2
"""Channels from which so few members show the rounding of a token, because it is a mean over its channels."""


@dataclass(frozen=True)
class Error:
    """How far ONNX Runtime is from float64, beside PyTorch in the arithmetic that it computes in."""

    relative: float
    """Root mean square of the error over that of the truth."""
    pytorch: float
    """The same of PyTorch."""
    ratios: dict[str, float]
    """In units of rounding, as `judge` has them: of all tokens together, and of the worst."""

    @property
    def failed(self) -> tuple[str, ...]:
        """The ratios that are over their limits."""
        return over(self.ratios, LIMITS)


@dataclass(frozen=True)
class StageResult:
    """One stage: its error on the activations that float64 has there, and the one that all stages so far add up to."""

    name: str
    own: Error
    accumulated: Error

    @property
    def passed(self) -> bool:
        return not self.own.failed and not self.accumulated.failed


@dataclass(frozen=True)
class StagesResult:
    """What `validate_stages` found. `passed` is everything together."""

    stages: tuple[StageResult, ...]
    damaged: dict[str, str]
    """Files that are not what they should be, with the reason."""
    dtype: str
    """Of PyTorch, whose rounding is the yardstick."""

    @property
    def failures(self) -> list[str]:
        """What failed, and why, in order."""
        found = [f"{name} {reason}" for name, reason in self.damaged.items()]
        for stage in self.stages:
            for kind, error in (("by itself", stage.own), ("accumulated", stage.accumulated)):
                told = ", ".join(f"{name} {error.ratios[name]:.2g} > {LIMITS[name]:g}" for name in error.failed)
                found += [f"{stage.name}, {kind}: {told} times rounding"] if told else []
        return found

    @property
    def passed(self) -> bool:
        return not self.failures


Kind = int | str
"""DOUBLE, SINGLE, or the number of a member."""
DOUBLE, SINGLE = "float64", "as the bundle computes"


@dataclass(frozen=True)
class Running:
    """What all stages share."""

    outline: Decoder
    """Of the checkpoint, converted as it was exported."""
    weights: ConvertedWeights
    feeds: Feeds
    arithmetic: torch.dtype
    """That ONNX Runtime computes in."""
    rounded: "Rounded"
    allowance: float
    """How many times PyTorch's rounding the bundle's operators are known to cost."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Who computes each stage in PyTorch."""
        few = self.outline.config.hidden_size >= WIDE
        return DOUBLE, SINGLE, *range(FEW if few else MEMBERS)

    def dtype(self, kind: Kind) -> torch.dtype:
        return torch.float64 if kind == DOUBLE else self.arithmetic

    def placed(self, weight: Tensor, kind: Kind, seed: int) -> Tensor:
        """A weight as `kind` has it: members have some of its numbers moved by one unit in the last place."""
        weight = weight.to(self.dtype(kind))
        if not isinstance(kind, int):
            return weight
        return neighbours(weight, torch.Generator().manual_seed(kind << 32 | seed))

    def error(self, found: dict[Kind, Tensor], got: Floats) -> Error:
        """Of what ONNX Runtime gives, against what every kind has found."""
        arrays = {kind: in_numpy(x).reshape(-1, x.shape[-1]) for kind, x in found.items()}
        truth, got = arrays[DOUBLE].astype(np.float64), got.reshape(-1, got.shape[-1])
        members = [array for kind, array in arrays.items() if isinstance(kind, int)]
        noise = Noise.of(truth, members, float(torch.finfo(self.arithmetic).eps), self.allowance)
        ratios = noise.ratios(truth, got)
        size = float(np.linalg.norm(truth)) or 1.0
        relative, pytorch = (float(np.linalg.norm(each - truth)) / size for each in (got, arrays[SINGLE]))
        return Error(relative, pytorch, {name: ratios[name] for name in LIMITS})

    def run(self, number: int, given: dict[Kind, list[Tensor]]) -> dict[Kind, list[Tensor]]:
        """What every kind gives in the stage `number` for what it is given, token ids [B, S] or activations
        [B, S, C].
        """
        if number == 0:
            return self._embedded(given)
        if number > self.outline.config.num_layers:
            return self._logits(given)
        name, rounded = f"layers.{number - 1}", self.rounded.of(f"layers.{number - 1}.", self.arithmetic)
        return {kind: self._layer(name, rounded, kind, x, number) for kind, x in given.items()}

    def _embedded(self, given: dict[Kind, list[Tensor]]) -> dict[Kind, list[Tensor]]:
        ids = given[DOUBLE][0]
        rows, start = torch.empty(*ids.shape, self.outline.config.hidden_size, dtype=self.outline.embed.weight.dtype), 0
        for piece in self.weights.pieces("embed.weight"):
            here = (ids >= start) & (ids < start + len(piece))
            rows[here] = piece[ids[here] - start]
            start += len(piece)
        return {kind: [self.placed(rows, kind, 0)] * len(x) for kind, x in given.items()}

    def _layer(self, name: str, rounded: dict[str, Tensor], kind: Kind, given: list[Tensor], seed: int) -> list[Tensor]:
        block = copy.deepcopy(self.outline.get_submodule(name))
        assert isinstance(block, Block)
        for i, (inner, parameter) in enumerate(list(block.named_parameters())):
            module, _, leaf = inner.rpartition(".")
            if ".rotary." not in inner:
                known = rounded.get(f"{name}.{inner}")
                whole = known if known is not None else self._whole(f"{name}.{inner}", parameter)
                placed = self.placed(whole, kind, seed << 16 | i)
                setattr(block.get_submodule(module), leaf, nn.Parameter(placed, requires_grad=False))
        ids, mask, positions = map(torch.from_numpy, self.feeds)
        step = self.outline.step_of(ids, mask, positions, self.dtype(kind))
        config = self.outline.config
        shape = config.num_kv_heads, self.outline.capacity, config.spectrum.head_dim
        with attention_for(block.attn_norm.weight):
            return [block(x, step, (empty := x.new_zeros(len(x), *shape), empty))[0] for x in given]

    def _whole(self, name: str, parameter: Tensor) -> Tensor:
        return torch.cat([*self.weights.pieces(name)]) if parameter.is_meta else parameter.detach()

    def _logits(self, given: dict[Kind, list[Tensor]]) -> dict[Kind, list[Tensor]]:
        rounded = self.rounded.of("lm_head", self.arithmetic)
        norm, found = self.outline.norm, {kind: [list[Tensor]() for _ in x] for kind, x in given.items()}
        inputs = {}
        for kind, each in given.items():
            scale = self.placed(norm.weight.detach(), kind, 1)
            inputs[kind] = [nn.functional.rms_norm(x, norm.normalized_shape, scale, norm.eps) for x in each]
        for i, piece in enumerate(rounded.values() or self.weights.pieces("lm_head.weight"), start=2):
            for kind, each in inputs.items():
                rows = self.placed(piece, kind, i)
                for x, parts in zip(each, found[kind], strict=True):
                    parts.append(nn.functional.linear(x, rows))
        return {kind: [torch.cat(parts, dim=-1) for parts in each] for kind, each in found.items()}


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
            weight = torch.from_numpy(layer.weight)
            taken[f"{layer.module}.weight"] = weight.to(precision).double() if layer.rounding else weight
            self._next = next(self._layers, None)
        return taken


def validate_stages(
    bundle: str | Path | Bundle,
    *,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> StagesResult:
    """Compare a bundle in ONNX Runtime with its checkpoint in PyTorch, one layer after the other, so that no more than
    one layer's weights are in memory; `passed` and `failures` of the result are as for `validate`.

    Each stage (the embedding, a layer, the head) is run twice on random tokens drawn by `seed`: on the activations that
    float64 has there, which all are given and which show its own error, and on those that each has itself, which show
    what has accumulated. `checkpoint` is where the checkpoint is now (None: where it was exported from); `report` is as
    for `validate`.

    Raises BundleError when the checkpoint is gone or is not the one that was exported, and BackendError when ONNX
    Runtime does not run the graph.

    >>> import fope_export as fx
    >>> result = fx.validate_stages("out")
    >>> [stage.name for stage in result.stages]
    ['embed', 'layers.0', 'layers.1', 'logits']
    """
    bundle = Bundle.of(bundle)
    check_graphs(bundle)
    running, parts = _running(bundle, source_of(bundle, checkpoint), seed), Parts.of(bundle)
    names = ["embed", *(f"layers.{i}" for i in range(running.outline.config.num_layers)), "logits"]
    ids = torch.from_numpy(running.feeds.input_ids)
    own, ort = dict.fromkeys(running.kinds, ids), running.feeds.input_ids
    results = []
    for number, name in enumerate(names):
        report(name, number, len(names))
        shared = own[DOUBLE].to(running.arithmetic) if number else ids
        with torch.inference_mode():
            given = {kind: [shared.to(running.dtype(kind)) if number else ids, x] for kind, x in own.items()}
            found = running.run(number, given)
        feeds = graph_feeds(bundle.manifest, running.feeds)
        got = [*parts.run(number, [feeds | {"x": x} for x in (shared.numpy(), ort)])]
        errors = (running.error({kind: x[i] for kind, x in found.items()}, got[i]) for i in range(2))
        results.append(StageResult(name, *errors))
        own, ort = {kind: x[1] for kind, x in found.items()}, got[1]
    damaged = bundle.damaged() | contradictions(bundle, running.outline)
    return StagesResult(tuple(results), damaged, str(running.arithmetic).removeprefix("torch."))


def _running(bundle: Bundle, source: Checkpoint, seed: int) -> Running:
    exported = bundle.manifest.export
    outline, weights = source.outline.converted(exported), ConvertedWeights(source, exported)
    outline.capacity, known = exported.capacity or 0, source.config
    length = min(TOKENS, exported.capacity or TOKENS)
    feeds = feeds_for(np.random.default_rng(seed).integers(0, known.vocab_size, (ROWS, length)))
    feeds.position_ids[1:] += max(known.training_length - length, 0)  # the others end where training did
    arithmetic = getattr(torch, BACKENDS["onnxruntime"].arithmetic(bundle))
    return Running(outline, weights, feeds, arithmetic, Rounded(bundle), allowance_of(bundle, outline))
