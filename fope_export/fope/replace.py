"""Rotations inside modules that somebody else wrote: finding them, and putting FopeRotary in their place."""

from collections.abc import Callable

from torch import nn

from fope_export.errors import ConfigError
from fope_export.fope.rotary import FopeRotary


def rotaries(module: nn.Module) -> dict[str, FopeRotary]:
    """Every FopeRotary inside `module`, by its path."""
    return {name: part for name, part in module.named_modules() if isinstance(part, FopeRotary)}


def replace_rotary(
    module: nn.Module, old: type[nn.Module] | Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> int:
    """Put `make(part)` in the place of every submodule that is an `old`, or that `old` says yes to; how many they were.

    What is made is called as the part was: a FopeRotary, or a module around one that brings the tensors into its
    shapes. A part that stands in several places is made once.

    Raises ConfigError where there is none.
    """
    wanted = old if not isinstance(old, type) else lambda part: isinstance(part, old)
    made: dict[nn.Module, nn.Module] = {}
    found = places(module, wanted)
    for parent, name, part in found:
        made[part] = made.get(part) or make(part).train(part.training)
        parent.register_module(name, made[part])
    if not found:
        kinds = sorted({type(part).__name__ for part in module.modules()})
        raise ConfigError(
            f"no part of {type(module).__name__} is {getattr(old, '__name__', old)}",
            hint=f"It is made of {', '.join(kinds)}.",
        )
    return len(made)


def places(parent: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, part) of every part that is wanted; inside such a part nothing more is looked for."""
    found = []
    for name, part in parent._modules.items():
        if part is not None:
            found += [(parent, name, part)] if wanted(part) else places(part, wanted)
    return found
