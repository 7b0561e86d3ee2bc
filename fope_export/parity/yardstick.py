"""What a backend is held against: PyTorch in float64, and copies of PyTorch that show what rounding does to a token."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from fope_export.backends.eager import EagerBackend
from fope_export.parity.cases import Case, Floats
from fope_export.parity.judge import MEMBERS, MORE, Measure, Noise, Verdict, judge, measure

DRAWN = 16
"""Of as many weights one moves up and one down. Moving more would itself cost more than rounding in half precision."""
HELD = 1 << 30
"""Bytes of members that are kept from case to case; others are made anew."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


Model = TypeVar("Model", bound=nn.Module)


def moved(model: Model, seed: int) -> Model:
    """A copy in which one weight in eight is moved by one unit in the last place, up or down; buffers stay."""
    member, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in member.parameters():
        parameter.data = neighbours(parameter.data, generator)
    return member


def neighbours(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The values, one in eight replaced by the next above or below it; zeros stay, and so does what would overflow."""
    if not tensor.is_floating_point() or tensor.element_size() not in INTEGERS:
        return tensor
    drawn = torch.randint(0, DRAWN, tensor.shape, generator=generator, dtype=torch.int8).to(tensor.device)
    integers = INTEGERS[tensor.element_size()]
    steps = ((drawn == 0).to(integers) - (drawn == 1).to(integers)) * (tensor != 0)
    found = (tensor.view(integers) + steps).view(tensor.dtype)
    return torch.where(found.isfinite(), found, tensor)


@dataclass(frozen=True)
class Look:
    """The logits [N, V] that one case should give, and what rounding does to them."""

    truth: Floats
    noise: Noise
    own: Measure
    """Of one of the members, for the reader."""
    again: Callable[[], Noise]
    """The noise of more members."""

    def judge(self, got: Floats) -> Verdict:
        """Hold a backend's logits against it."""
        return judge(self.truth, self.noise, got, self.again)


def look(truth: Floats, members: Callable[[range], Iterator[Floats]], eps: float, allowance: float = 1.0) -> Look:
    """From what the members with the numbers of a range give. Raises ParityError where that is not finite."""
    first = list(members(range(MEMBERS)))
    noise = Noise.of(truth, first, eps, allowance)
    own = measure(truth, first[0], noise.tied())
    return Look(truth, noise, own, cache(lambda: noise.joined(truth, members(range(MEMBERS, MEMBERS + MORE)))))


@dataclass
class Yardstick:
    """PyTorch in the arithmetic that a backend computes in, its members, and PyTorch in float64."""

    single: EagerBackend
    double: EagerBackend
    allowance: float = 1.0
    """How many times PyTorch's rounding an operator of the file is known to cost."""
    _held: dict[int, EagerBackend] = field(default_factory=dict, repr=False)

    @property
    def eps(self) -> float:
        """Of the arithmetic."""
        return float(torch.finfo(self.single.model.embed.weight.dtype).eps)

    def member(self, number: int) -> EagerBackend:
        """The same for the same number, until `single` becomes another."""
        if number in self._held:
            return self._held[number]
        made = EagerBackend(moved(self.single.model, number))
        size = sum(parameter.nbytes for parameter in made.model.parameters())
        if (len(self._held) + 1) * size <= HELD:
            self._held[number] = made
        return made

    def look(self, case: Case) -> Look:
        """At one case. Raises ParityError where PyTorch gives values that are not finite."""

        def members(numbers: range) -> Iterator[Floats]:
            return (case.prefilled(self.member(number)) for number in numbers)

        return look(case.prefilled(self.double), members, self.eps, self.allowance)
