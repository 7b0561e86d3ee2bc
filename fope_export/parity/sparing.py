"""A yardstick with one model in memory at a time: what each gives in all cases lies on the disk until it is judged."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fope_export.backends.eager import EagerBackend
from fope_export.model.assembly import PIECE
from fope_export.parity.cases import Case, Floats
from fope_export.parity.disk import kept
from fope_export.parity.judge import MEMBERS
from fope_export.parity.yardstick import Look, Yardstick, look, neighbours

AT_ONCE = 1 << 33
"""Bytes that the logits of members take on the disk: they are made anew for what exceeds that."""


@dataclass
class SparingYardstick(Yardstick):
    """The same numbers as the other's, for models that are large beside memory."""

    def member(self, number: int) -> EagerBackend:
        """Made anew, a piece of a weight at a time."""
        model, generator = self.single.model.sharing(), torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.data = _moved(parameter.data, generator)
        return EagerBackend(model)

    def looks(self, cases: Sequence[Case], report: Callable[[str], None] = lambda what: None) -> list[Look]:
        """At each of the cases, of which `report` is told as PyTorch begins with them: all in float64, and then all in
        each member, of which none outlives its turn.

        The truth stays on the disk for as long as the Look, 8 bytes a logit; members' logits, 32 bytes, are there until
        it is made.

        Raises ParityError where PyTorch gives values that are not finite, and OSError where the disk is full.
        """
        return [each for group in _groups(cases, self.single.vocab_size) for each in self._looks(group, report)]

    def _looks(self, cases: Sequence[Case], report: Callable[[str], None]) -> list[Look]:
        truths = _given(self.double, cases, report)
        first = [_given(self.member(number), cases, report) for number in range(MEMBERS)]
        return [
            self._look(case, truth, list(given))
            for case, truth, given in zip(cases, truths, zip(*first, strict=True), strict=True)
        ]

    def _look(self, case: Case, truth: Floats, given: list[Floats]) -> Look:
        """From what the first members have `given`, which is let go."""

        def members(numbers: range) -> Iterator[Floats]:
            return (given.pop(0) if given else case.prefilled(self.member(number)) for number in numbers)

        return look(truth, members, self.eps, self.allowance)


def _given(backend: EagerBackend, cases: Sequence[Case], report: Callable[[str], None]) -> list[Floats]:
    found = []
    for case in cases:
        report(f"{case.name}, {backend.name}")
        found.append(kept(case.prefilled(backend)))
    return found


def _groups(cases: Sequence[Case], vocab_size: int) -> Iterator[list[Case]]:
    """Cases in their order, as many together as their members' logits leave room for."""
    group, taken = list[Case](), 0
    for case in cases:
        size = 4 * MEMBERS * vocab_size * int(np.count_nonzero(case.feeds.attention_mask[:, -case.kept :]))
        if group and taken + size > AT_ONCE:
            yield group
            group, taken = [], 0
        group.append(case)
        taken += size
    if group:
        yield group


def _moved(weight: Tensor, generator: torch.Generator) -> Tensor:
    """What `neighbours` makes of it, a piece at a time."""
    whole, rows = torch.empty_like(weight), max(PIECE // max(weight[:1].numel(), 1), 1)
    for made, part in zip(whole.split(rows), weight.split(rows), strict=True):
        made.copy_(neighbours(part, generator))
    return whole
