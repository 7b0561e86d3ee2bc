"""What quantization costs, beside the checkpoint; and the checkpoint with the weights and rounding of the file."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fope_export.backends.base import Backend, Ids, feeds_for
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.corpus import as_tokens, python_source
from fope_export.dtypes import FP32
from fope_export.errors import BackendError, BundleError
from fope_export.graph.ways import Quantized, Rounding, way_of
from fope_export.model.decoder import Decoder
from fope_export.model.experts import Experts
from fope_export.parity.judge import Floats, divergence, log_softmax
from fope_export.quantizations import COMPENSATED, QUANTIZATIONS
from fope_export.tokens import Tokenizer

SCORED = 1 << 14
"""Bytes of held-out text that the cost is taken on, where the vocabulary is bytes."""
DRAWN = 1 << 11
"""Random tokens that it is taken on elsewhere."""
LONGEST = 1024
"""Tokens of a window at most."""
AT_ONCE = 1 << 22
"""Logits of one batch of windows, unless one window has more."""
BLOCKED = 384
"""Products that PyTorch adds one after the other before it adds the sums (oneDNN's and MKL's block of K)."""
SAMPLE = 'def naïve():\n\treturn "…"\n'


@dataclass(frozen=True)
class Cost:
    """The bundle beside its checkpoint in PyTorch, in the same dtype and with the weights it was trained to."""

    kind: str
    tokens: int
    kl: float
    """Mean over the tokens of the divergence from the checkpoint's prediction, in nats."""
    perplexity: float | None
    """Of held-out Python with the checkpoint; None where the vocabulary is not bytes."""
    quantized: float | None
    """The same with the bundle."""
    strays: tuple[str, ...]
    """Weights further from the checkpoint's than rounding explains: to the nearest step, or up or down to the next."""
    stray: ClassVar[str] = "is no rounding of the checkpoint's"

    @property
    def what(self) -> str:
        """What is quantized, in words."""
        return f"{self.kind} {QUANTIZATIONS[self.kind].rounded}"

    @property
    def growth(self) -> float | None:
        """Of the perplexity, as a share of it."""
        return self.quantized / self.perplexity - 1 if self.quantized and self.perplexity else None

    @property
    def limit(self) -> float:
        """The most that it may grow by."""
        return QUANTIZATIONS[self.kind].growth

    @property
    def failed(self) -> tuple[str, ...]:
        """What is too much, in words."""
        reasons = [f"{name} {self.stray}" for name in self.strays]
        if self.growth is not None and not self.growth <= self.limit:
            reasons.append(f"perplexity grows by {self.growth:.2%} > {self.limit:.1%}")
        return tuple(reasons)


def cost_of(bundle: Bundle, model: Decoder, tested: Backend) -> Cost:
    """Hold a quantized bundle against its checkpoint's own weights, which `model` has.

    Raises BackendError when the bundle does not run.
    """
    kind = bundle.manifest.export.quantize
    assert kind
    return Cost(kind, *change(bundle, EagerBackend(model), tested), tuple(_strays(bundle, model)))


def change(bundle: Bundle, one: Backend, other: Backend) -> tuple[int, float, float | None, float | None]:
    """How many tokens the divergence of one backend's predictions from another's was taken on, its mean, and the
    perplexity of held-out Python with each; None where the vocabulary is not bytes. Raises BackendError when one does
    not run.
    """
    export, config = bundle.manifest.export, bundle.manifest.decoder()
    length = max(min(config.training_length, LONGEST, export.capacity or LONGEST), 2)
    known = takes_bytes(bundle)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, DRAWN)
    tokens = as_tokens(python_source(held_out=True))[:SCORED] if known else drawn
    kl, losses = [], []
    for ids in _windows(tokens, length, rows=max(AT_ONCE // (length * config.vocab_size), 1)):
        before, after = (_logits(backend, ids) for backend in (one, other))
        kl.append(divergence(before, after))
        losses.append([_losses(before, ids), _losses(after, ids)])
    kls = np.concatenate(kl)
    perplexities = [float(each) for each in np.exp(np.concatenate(losses, axis=1).mean(axis=1))]
    perplexity, rounded = perplexities if known else (None, None)
    return len(kls), float(kls.mean()), perplexity, rounded


def allowance_of(bundle: Bundle, model: nn.Module) -> float:
    """How many times PyTorch's rounding the bundle's operators are known to cost; 1 is no more.

    ONNX Runtime's product with small integers adds the K terms of a sum one after the other where it has several rows,
    and rounding then grows with the square root of K, while PyTorch's grows with that of a block. What float16 rounds
    outweighs both.
    """
    export = bundle.manifest.export
    if not export.quantization or export.quantization.blocked or export.dtype != FP32.name:
        return 1.0
    longest = max(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    return max(1.0, math.sqrt(longest / BLOCKED))


def place_weights(
    bundle: Bundle, model: Decoder, arithmetic: str = "", kept: Callable[[Tensor], Tensor] = lambda weight: weight
) -> None:
    """Give the linear layers and experts of `model` the weights that the bundle's small numbers stand for, in the
    `arithmetic` that a backend computes it in (else its own dtype), where `kept` puts them.

    Raises BackendError when the bundle names a layer that `model` lacks.
    """
    precision = getattr(torch, arithmetic or bundle.manifest.export.precision)
    for stored in _layers(bundle):
        layer, weight = _layer(model, stored.module), stored.for_inputs(precision)
        # A new parameter, because an embedding may share the old one.
        setattr(layer, stored.leaf, nn.Parameter(kept(weight.to(model.dtype)), requires_grad=False))


def round_inputs(bundle: Bundle, model: Decoder) -> None:
    """Have the linear layers of `model` round their inputs as the bundle's do."""
    for stored in _layers(bundle):
        if stored.rounding:
            _layer(model, stored.module).register_forward_pre_hook(partial(_rounded, stored.rounding))


def _rounded(rounding: Rounding, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Inputs on the grid, as QuantizeLinear and DequantizeLinear put them there."""
    (x,) = inputs
    steps = (x.to(torch.promote_types(x.dtype, torch.float32)) / rounding.scale).clamp(rounding.least, rounding.largest)
    whole = steps.round() if rounding.integers else steps.to(torch.float8_e4m3fn).to(steps.dtype)
    return (whole * rounding.scale).to(x.dtype)


def _layers(bundle: Bundle) -> Iterator[Quantized]:
    row = bundle.manifest.export.quantization
    return way_of(row).read(bundle.model) if row else iter(())


def _strays(bundle: Bundle, model: Decoder) -> Iterator[str]:
    halves = 2 if bundle.manifest.export.rounding == COMPENSATED else 1  # of a step
    for stored in _layers(bundle):
        original = _layer(model, stored.module).get_parameter(stored.leaf).double().numpy()
        weight = stored.for_inputs(torch.float64).numpy()
        allowed = stored.allowed * (halves if stored.leaf == "weight" else 1)  # experts are rounded to the nearest
        if original.shape != allowed.shape or not (np.abs(weight - original) <= allowed).all():
            yield stored.name


def _layer(model: Decoder, name: str) -> nn.Linear | Experts:
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear | Experts):
        raise BackendError(f"the graph quantizes {name}, which is no linear layer", hint="Export the checkpoint again.")
    return layer


def takes_bytes(bundle: Bundle) -> bool:
    """Whether the bundle's tokens are bytes, so that any text can be scored."""
    try:
        return Tokenizer(bundle.path).encode(SAMPLE) == list(SAMPLE.encode())
    except BundleError:  # no tokenizer
        return False


def _windows(tokens: Ids, length: int, rows: int) -> Iterator[Ids]:
    """Whole windows [rows, length], one after the other; what is left at the end is dropped."""
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    yield from (windows[i : i + rows] for i in range(0, len(windows), rows))


def _logits(backend: Backend, ids: Ids) -> Floats:
    """[tokens, V], row after row."""
    step, _ = backend.step(feeds_for(ids), backend.empty_cache(len(ids)))
    logits: Floats = step.reshape(ids.size, -1).astype(np.float64)
    return logits


def _losses(logits: Floats, ids: Ids) -> Floats:
    """Negative log-likelihood of each next token in windows [rows, length]."""
    predicted = log_softmax(logits).reshape(*ids.shape, -1)[:, :-1]
    losses: Floats = -np.take_along_axis(predicted, ids[:, 1:, None], axis=2).ravel()
    return losses
