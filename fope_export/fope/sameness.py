"""Whether two rotations compute the same: called with the same numbers, in float32, as far as an angle can be held.

B batch, S sequence, H heads, E head_dim.
"""

import copy
import inspect
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fope_export.errors import ConfigError
from fope_export.fope.rotary import FopeRotary

LENGTHS = (1, 7, 130)
STARTS = (0, 3, 50)
POSITIONS, START, LENGTH, UNKNOWN = "positions", "start", "length", "unknown"
ROLES = {
    UNKNOWN: ("emb", "cos", "sin", "freq", "mask", "cache", "table"),
    POSITIONS: ("pos",),
    START: ("offset", "start"),
    LENGTH: ("len",),
}
"""What a parameter of a rotation is for, by a part of its name. Others are queries, keys or values."""
ROUNDINGS = 8
"""Times that an angle is rounded on its way to a result, in both parts together: frequency, product, wave, sum."""
MOST = 0.01
"""Of the largest number: what is further apart is another rotation, however far the position."""


@dataclass(frozen=True)
class Call:
    """What a part is called with. `furthest` is the largest position that it may see."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    furthest: int

    @property
    def described(self) -> str:
        """The tensors' shapes and the numbers."""
        each = [*self.args, *(f"{name}={_short(value)}" for name, value in self.kwargs.items())]
        return f"({', '.join(map(_short, each))})"


def _short(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else str(value)


@dataclass(frozen=True)
class Difference:
    """How far apart two results are, in units of what may be."""

    excess: float
    described: str


def difference(old: nn.Module, new: nn.Module, call: Call) -> Difference | None:
    """Between two parts in float32; None where one of them does not take the call, or gives no numbers.

    An angle at position n is off by n units in the last place after each rounding, and a result by as much of the
    largest number in it.
    """
    wanted, got = (_tried(part, call) for part in (old, new))
    if wanted is None or got is None or not all(x.isfinite().all() for x in wanted):
        return None
    if [x.shape for x in wanted] != [x.shape for x in got]:
        shapes = " in place of ".join(str([list(x.shape) for x in each]) for each in (got, wanted))
        return Difference(float("inf"), f"shapes {shapes}, called with {call.described}")
    largest = max((float(x.abs().max()) for x in wanted if x.numel()), default=0.0)
    apart = max((float((x - y).abs().max()) for x, y in zip(wanted, got, strict=True) if x.numel()), default=0.0)
    share = apart / largest if largest else apart
    allowed = min(ROUNDINGS * torch.finfo(torch.float32).eps * max(call.furthest, 1), MOST)
    excess = share / allowed if math.isfinite(share) else math.inf
    return Difference(excess, f"off by {share:.2%} of the largest number, called with {call.described}")


def alone(part: nn.Module) -> nn.Module:
    """A copy in float32, to be called as one likes. Raises ConfigError where it cannot be copied."""
    try:
        return copy.deepcopy(part).float().eval()
    except Exception as cause:  # somebody else's code
        raise ConfigError(
            f"{type(part).__name__} cannot be copied, to be compared: {str(cause)[:200]}",
            hint="Does copy.deepcopy take it? same=False compares nothing.",
        ) from cause


def _tried(part: nn.Module, call: Call) -> list[Tensor] | None:
    """The tensors that the part gives back, in double, or None where it fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = part(*pytree.tree_map(_copied, call.args), **pytree.tree_map(_copied, call.kwargs))
    except Exception:  # somebody else's code, called in ways that it may not be made for
        return None
    return [leaf.double() for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)] or None


def _copied(value: Any) -> Any:
    """For code that writes to what it is given; in float32."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    return value.float().clone() if value.is_floating_point() else value.clone()


def drawn_calls(old: nn.Module, new: nn.Module) -> Iterator[Call]:
    """Calls with random queries and keys of several lengths, at several positions, which differ by axis where the new
    rotation has some, in every usual layout; as many queries' heads as keys', or a few times as many.
    """
    generator = torch.Generator().manual_seed(0)
    rotary = next((part for part in new.modules() if isinstance(part, FopeRotary)), None)
    groups, width = (rotary.config.groups, rotary.config.head_dim) if rotary else (1, 16)
    heads, axes = groups if groups > 1 else 2, rotary.config.axes if rotary else 1
    several = sum(not _role(name) for name in _parameters(old)) > 1
    for length, share in itertools.product(LENGTHS, (1, 2, 4, 8) if several else (1,)):
        queries, keys = (
            ((2, each, length, width), (2, length, each, width), (2, length, each * width))
            for each in (share * heads, heads)
        )
        for shapes, numbers in itertools.product(zip(queries, keys, strict=True), _numbers(old, length, axes)):
            yield from _calls(old, shapes, numbers, generator)


def _numbers(part: nn.Module, length: int, axes: int) -> list[dict[str, Any]]:
    """What parameters of each role may be: positions of each row [B, S], or of all rows [S], or on several axes
    [A, B, S]. One is enough for a part that has none.
    """
    choices = []
    for start in STARTS:
        positions = torch.arange(length) + start * torch.tensor([[1], [20]])
        apart = [positions + 7 * torch.arange(axes)[:, None, None]] if axes > 1 else []
        choices += [{POSITIONS: each, START: start, LENGTH: length} for each in (positions, positions[0], *apart)]
    return choices if any(_role(name) in ROLES for name in _parameters(part)) else choices[:1]


def _calls(
    part: nn.Module, shapes: tuple[tuple[int, ...], ...], numbers: Mapping[str, Any], generator: torch.Generator
) -> Iterator[Call]:
    """With and without the numbers that may be left out; none where something else is required. The first tensor has
    the first of the shapes, others the second.
    """
    parameters = _parameters(part)
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if any(_role(name) == UNKNOWN for name in required):
        return
    device = next((x.device for x in itertools.chain(part.parameters(), part.buffers())), torch.device("cpu"))
    in_order = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    optional = {name for name in parameters if _role(name) in numbers} - required
    for names in dict.fromkeys((frozenset(required), frozenset(required | optional))):
        drawn = itertools.chain(shapes, itertools.repeat(shapes[-1]))
        given = {
            name: numbers[_role(name)] if _role(name) else torch.randn(next(drawn), generator=generator)
            for name in parameters
            if name in names
        }
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
        args = list(itertools.takewhile(given.__contains__, in_order))
        furthest = int(numbers[POSITIONS].max()) + numbers[LENGTH]
        kwargs = {name: value for name, value in given.items() if name not in args}
        yield Call(tuple(given[name] for name in args), kwargs, furthest)


def _role(name: str) -> str:
    return next((role for role, parts in ROLES.items() if any(part in name.lower() for part in parts)), "")


def _parameters(part: nn.Module) -> dict[str, inspect.Parameter]:
    """Those of its forward that have names; q, k and perhaps positions where it takes any."""
    try:
        given = inspect.signature(part.forward).parameters
    except (TypeError, ValueError):  # compiled code has none
        return {}
    if any(p.kind is p.VAR_POSITIONAL for p in given.values()):
        first = {name: inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("q", "k")}
        return first | {POSITIONS: inspect.Parameter(POSITIONS, inspect.Parameter.POSITIONAL_ONLY, default=None)}
    return {name: p for name, p in given.items() if p.kind is not p.VAR_KEYWORD}


def seen_calls(
    module: nn.Module, parts: Sequence[nn.Module], inputs: Sequence[Tensor] | Mapping[str, Tensor]
) -> dict[nn.Module, list[Call]]:
    """How `module`, run on `inputs`, calls each of its parts.

    Raises ConfigError where it does not run.
    """
    calls: dict[nn.Module, list[Call]] = {part: [] for part in parts}

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = [int(x.max()) for x in tensors if not x.is_floating_point() and x.numel()]
        sizes = [size for x in tensors for size in x.shape[:-1]]
        args, kwargs = pytree.tree_map(_copied, (args, kwargs))
        calls[part].append(Call(args, kwargs, max(sizes + numbers, default=1)))

    hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as cause:  # the module's own code runs in there
        raise ConfigError(
            f"{type(module).__name__} does not run on the inputs: {str(cause)[:200]}", hint="Give those of its forward."
        ) from cause
    finally:
        for hook in hooks:
            hook.remove()
    return calls
