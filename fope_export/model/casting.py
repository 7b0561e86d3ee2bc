"""A model that computes in another dtype than its weights have: a module's are cast when it runs."""

from typing import Any

import torch
from torch import Tensor, nn

from fope_export.fope.rotary import FopeRotary


def cast_when_used(model: nn.Module, dtype: torch.dtype) -> None:
    """Have every part of `model` compute in `dtype`, as if all its weights were cast at once. The rotations' numbers
    stay as they are, and embeddings are cast when they have been looked up.
    """
    rotations = {part for module in model.modules() if isinstance(module, FopeRotary) for part in module.modules()}
    for module in model.modules():
        if module in rotations:
            continue
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_Looked(dtype))
        elif any(True for _ in module.parameters(recurse=False)):
            cast = _Cast(dtype)
            module.register_forward_pre_hook(cast.before)
            module.register_forward_hook(cast.after, always_call=True)


class _Looked:
    """A hook that casts what a module gives."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        return output.to(self._dtype)


class _Cast:
    """Hooks between which a module has its own weights in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._own = dtype, dict[str, nn.Parameter]()

    def before(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        self._own = dict(module.named_parameters(recurse=False))
        for name, weight in self._own.items():
            setattr(module, name, nn.Parameter(weight.detach().to(self._dtype), requires_grad=False))

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        for name, weight in self._own.items():
            setattr(module, name, weight)
        self._own = {}
