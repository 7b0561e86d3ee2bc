"""Rotations inside modules that somebody else wrote: finding them, and putting FopeRotary in their place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fope_export.errors import ConfigError
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.sameness import Call, alone, difference, drawn_calls, seen_calls


def rotaries(module: nn.Module) -> dict[str, FopeRotary]:
    """Every FopeRotary inside `module`, by its path."""
    return {name: part for name, part in module.named_modules() if isinstance(part, FopeRotary)}


def replace_rotary(
    module: nn.Module,
    old: type[nn.Module] | Callable[[nn.Module], bool],
    make: Callable[[Any], nn.Module],
    *,
    inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    same: bool = True,
) -> int:
    """Put `make(part)` in the place of every submodule of `module` that is an `old`, or that `old` says yes to; how
    many were replaced.

    What `make` gives is called as the part was: a FopeRotary, or a module around one that brings the tensors into its
    shapes. A part that stands in several places is made once.

    Both are called with the same numbers and must give the same results, in float32: with random queries, keys and
    positions of several lengths, in every layout that the part takes; or, where `inputs` of the whole `module` are
    given, as it calls its parts. `same=False` leaves that out, for a model that is to be trained anew.

    Raises ConfigError where there is no such part, or where one computes something else or cannot be compared; then
    `module` is as it was.

    >>> import fope_export as fx, torch
    >>> rotary = fx.FopeRotary.create(head_dim=16, groups=1, training_length=64)
    >>> model = torch.nn.ModuleDict({"rotary": rotary})
    >>> fx.replace_rotary(model, fx.FopeRotary, lambda part: fx.FopeRotary.from_spectrum(part.spectrum))
    1
    """
    wanted = old if not isinstance(old, type) else lambda part: isinstance(part, old)
    chosen = places(module, wanted)
    if not chosen:
        kinds = sorted({type(part).__name__ for part in module.modules()})
        raise ConfigError(
            f"no part of {type(module).__name__} is {getattr(old, '__name__', old)}",
            hint=f"It is made of {', '.join(kinds)}.",
        )
    made = {part: make(part).train(part.training) for part in dict.fromkeys(part for *_, part in chosen)}
    if same:
        paths = {part: path for path, part in module.named_modules()}
        calls = None if inputs is None else seen_calls(module, list(made), inputs)
        for part, new in made.items():
            _compare(paths[part], part, new, drawn_calls(part, new) if calls is None else calls[part])
    for parent, name, part in chosen:
        parent.register_module(name, made[part])
    return len(made)


def _compare(path: str, part: nn.Module, new: nn.Module, calls: Iterable[Call]) -> None:
    """Raises ConfigError where the two differ, or where no call is taken by both."""
    old, made, compared = alone(part), alone(new), 0
    for call in calls:
        if (deviation := difference(old, made, call)) is None:
            continue
        compared += 1
        if deviation.excess > 1:
            raise ConfigError(
                f"{path}: what replaces {type(part).__name__} is not the same: {deviation.described}",
                hint="Compare pads, pairing, sign, the order of heads and axes, and positions. With `inputs` only the "
                "module's own calls count, with same=False none.",
            )
    if not compared:
        raise ConfigError(
            f"{path}: {type(part).__name__} cannot be compared with what replaces it",
            hint="Give `inputs`, with which the whole module runs and calls it; or same=False, to train it anew.",
        )


def places(parent: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, part) of every part that is wanted; inside such a part nothing more is looked for."""
    parts = []
    for name, part in parent._modules.items():
        if part is not None:
            parts += [(parent, name, part)] if wanted(part) else places(part, wanted)
    return parts
