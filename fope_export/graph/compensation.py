"""Weights rounded up or down with the layers' inputs in mind: the error that one input's weights are left with is taken
back by those of the inputs that follow (GPTQ, Frantar et al., arXiv:2210.17323; here the grid is given).

N outputs, K inputs, C hidden channels, W windows of S tokens.
"""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fope_export.errors import ExportError
from fope_export.graph.calibration import HINT
from fope_export.model.conversion import ConvertedWeights
from fope_export.model.decoder import Decoder

DAMPING = 0.01
"""Share of the inputs' mean square that is added to that of each: what the sample does not show may still come."""
AT_ONCE = 1 << 12
"""Outputs whose weights are rounded at once."""
PENDING = 64
"""Inputs after which what they left over is spread over all that follow."""


class Moments:
    """The sum over sample tokens of x x^T, float64 [K, K], for the inputs x of each linear layer of a decoder that is
    not rounded. In memory are the weights of one of its layers, and one activation of every token.
    """

    def __init__(self, outline: Decoder, weights: ConvertedWeights, windows: Tensor) -> None:
        """Of the converted `outline` of a checkpoint with its `weights`, on token ids int64 [W, S]."""
        self._outline, self._weights, self._windows = outline, weights, windows
        self._known: dict[str, Tensor] = {}
        self._stages = self._run()

    def of(self, module: str) -> Tensor:
        """Those of the linear layer with that path. Each is asked for once, in order of execution.

        Raises ExportError where they are not finite.
        """
        while module not in self._known:
            self._known = {}
            next(self._stages)
        moments = self._known.pop(module)
        if not moments.isfinite().all():
            raise ExportError(f"on sample text, the inputs of {module} are not finite", hint=HINT)
        return moments

    def _run(self) -> Iterator[None]:
        """Ends a step when `_known` has what belongs to a layer of the decoder, or to its head."""
        config, ids = self._outline.config, self._windows[:1]
        hidden = self._weights.rows("embed.weight", self._windows).float()
        positions = torch.arange(ids.shape[1])[None]
        step = self._outline.step_of(ids, torch.ones_like(ids), positions, hidden.dtype)
        empty = hidden.new_zeros(1, config.num_kv_heads, 0, config.spectrum.head_dim)
        for i in range(config.num_layers):
            layer = self._filled(f"layers.{i}")
            with torch.no_grad():
                hidden = torch.cat([layer(x[None], step, (empty, empty))[0] for x in hidden])
            yield
        norm = self._filled("norm")
        for x in hidden:
            self._add("lm_head", norm, (norm(x).detach(),))
        yield

    def _filled(self, name: str) -> nn.Module:
        """A part of the decoder in float32, with its weights, and with linear layers that count their inputs."""
        part = copy.deepcopy(self._outline.get_submodule(name))
        for inner, parameter in list(part.named_parameters()):
            if parameter.is_meta:
                path, _, leaf = inner.rpartition(".")
                whole = torch.cat([piece.float() for piece in self._weights.pieces(f"{name}.{inner}")])
                setattr(part.get_submodule(path), leaf, nn.Parameter(whole, requires_grad=False))
        for inner, layer in part.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(partial(self._add, f"{name}.{inner}"))
        return part.float()

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2)
        product = (x.T @ x).double()
        self._known[name] = self._known[name].add_(product) if name in self._known else product


def compensated(weight: Tensor, steps: Tensor, zeros: Tensor, *, block: int, largest: int, moments: Tensor) -> Tensor:
    """Integers [K, N] from 0 to `largest`, which stand for (integer - zero) * step: of the two next to each weight
    [K, N] the one that leaves outputs nearer to what they were. `steps` and `zeros` are float32 [K / block, N].

    Inputs go from the largest to the smallest, as the last have none left that could take anything back.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    spread, block_of = _spread(moments[order][:, order]), order // block
    whole = torch.empty_like(weight)
    for columns in torch.arange(weight.shape[1]).split(AT_ONCE):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        grid = steps[:, part][block_of], zeros[:, part][block_of]
        whole[order, part] = _rounded(weight[:, part][order], *grid, largest, spread)
    return whole


def _spread(moments: Tensor) -> Tensor:
    """[K, K]: row k has what is taken off the weights of later inputs for each unit that the k-th leaves over."""
    mean = moments.diagonal().mean()
    moments.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    spread: Tensor = upper / upper.diagonal()[:, None]
    return spread.float()


def _rounded(weight: Tensor, steps: Tensor, zeros: Tensor, largest: int, spread: Tensor) -> Tensor:
    """Integers in the place of a weight [K, N], which is used up."""
    steps = steps.clamp_min(torch.finfo(steps.dtype).tiny)
    below = (weight / steps).floor().add_(zeros)
    least, most = below.clamp(0, largest), (below + 1).clamp(0, largest)
    for some in torch.arange(len(weight)).split(PENDING):
        start, end = int(some[0]), int(some[-1]) + 1
        left = torch.empty_like(weight[start:end])
        for k in range(start, end):
            whole = (weight[k] / steps[k]).round().add_(zeros[k]).clamp(least[k], most[k])
            left[k - start] = weight[k] - (whole - zeros[k]) * steps[k]
            weight[k + 1 : end].addr_(spread[k, k + 1 : end], left[k - start], alpha=-1)
            weight[k] = whole
        weight[end:].addmm_(spread[start:end, end:].T, left, alpha=-1)
    return weight
