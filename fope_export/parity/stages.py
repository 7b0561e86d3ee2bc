"""Validation of a bundle layer by layer, for models that are larger than memory: one stage at a time, on the same
activations, with the weights of that stage alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fope_export.backends.base import axes_of, feeds_for, inputs_of
from fope_export.backends.choose import BACKENDS
from fope_export.backends.eager import in_numpy
from fope_export.bundle import Bundle
from fope_export.model.checkpoint import Checkpoint, source_of
from fope_export.model.conversion import ConvertedWeights
from fope_export.onnx_files import check_graphs
from fope_export.parity.axes import image_in
from fope_export.parity.cases import graph_feeds
from fope_export.parity.judge import Noise, over
from fope_export.parity.layerwise import DOUBLE, SINGLE, Kind, Layerwise, Rounded, doubled
from fope_export.parity.localize import LIMITS
from fope_export.parity.parts import Parts
from fope_export.parity.quantized import allowance_of
from fope_export.parity.run import contradictions

Floats = NDArray[np.floating[Any]]
ROWS, TOKENS = 2, 32
"""Of the random sequences that go through the stages: as many tokens as make a mean (`judge.ENOUGH`)."""


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


def validate_stages(
    bundle: str | Path | Bundle,
    *,
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> StagesResult:
    """Compare a bundle in ONNX Runtime with its checkpoint in PyTorch, one layer after the other, so that no more than
    one layer's weights are in memory; `passed` and `failures` of the result are as for `validate`.

    Each stage (the embedding, a layer, the head) is run twice on random tokens drawn by `seed`: on the activations that
    float64 has there, which all are given and which show its own error, and on those that each has itself, which show
    what has accumulated. `checkpoint` and `adapter` are where these are now (None: where they were exported from);
    `report` is as for `validate`.

    Raises BundleError when the checkpoint is gone or is not the one that was exported, and BackendError when ONNX
    Runtime does not run the graph.

    >>> import fope_export as fx
    >>> result = fx.validate_stages("out")
    >>> [stage.name for stage in result.stages]
    ['embed', 'layers.0', 'layers.1', 'logits']
    """
    bundle = Bundle.of(bundle)
    check_graphs(bundle)
    decoder, parts = _layerwise(bundle, source_of(bundle, checkpoint, adapter), seed), Parts.of(bundle)
    allowance, results = allowance_of(bundle, decoder.outline), []
    feeds = graph_feeds(bundle.manifest, decoder.feeds) | inputs_of(bundle.manifest, decoder.feeds)
    x = decoder.feeds.input_ids
    given = dict.fromkeys(decoder.kinds, torch.from_numpy(x))
    for number, name in enumerate(decoder.stages):
        report(name, number, len(decoder.stages))
        with torch.inference_mode():
            found = decoder.run(number, given)
            got = parts.run(number, feeds | {"x": x})
            errors = [
                _error(
                    {kind: y.chunk(2)[half] for kind, y in found.items()}, np.split(got, 2)[half], decoder, allowance
                )
                for half in range(2)
            ]
            results.append(StageResult(name, *errors))
            shared = found[DOUBLE].chunk(2)[1].to(decoder.arithmetic)
            given = {kind: torch.cat((shared.to(y.dtype), y.chunk(2)[1])) for kind, y in found.items()}
            x = np.concatenate((shared.numpy(), np.split(got, 2)[1]))
    damaged = bundle.damaged() | contradictions(bundle, decoder.outline)
    return StagesResult(tuple(results), damaged, str(decoder.arithmetic).removeprefix("torch."))


def _layerwise(bundle: Bundle, source: Checkpoint, seed: int) -> Layerwise:
    exported = bundle.manifest.export
    outline, weights = source.outline.converted(exported), ConvertedWeights(source, exported)
    outline.capacity, known = exported.capacity or 0, source.config
    length = min(TOKENS, exported.capacity or TOKENS)
    feeds = feeds_for(np.random.default_rng(seed).integers(0, known.vocab_size, (ROWS, length)))
    feeds.position_ids[1:] += max(known.training_length - length, 0)  # the others end where training did
    axes = axes_of(bundle.manifest)
    feeds = image_in(feeds, axes) if axes else feeds
    arithmetic = getattr(torch, BACKENDS["onnxruntime"].arithmetic(bundle))
    return Layerwise(outline, weights, Rounded(bundle), doubled(feeds), arithmetic)


def _error(found: Mapping[Kind, Tensor], got: Floats, decoder: Layerwise, allowance: float) -> Error:
    """Of what ONNX Runtime gives, against what every kind has found."""
    arrays = {kind: in_numpy(x).reshape(-1, x.shape[-1]) for kind, x in found.items()}
    truth, got = arrays[DOUBLE].astype(np.float64), got.reshape(-1, got.shape[-1])
    members = [array for kind, array in arrays.items() if isinstance(kind, int)]
    ratios = Noise.of(truth, members, torch.finfo(decoder.arithmetic).eps, allowance).ratios(truth, got)
    size = float(np.linalg.norm(truth)) or 1.0
    relative, pytorch = (float(np.linalg.norm(each - truth)) / size for each in (got, arrays[SINGLE]))
    return Error(relative, pytorch, {name: ratios[name] for name in LIMITS})
