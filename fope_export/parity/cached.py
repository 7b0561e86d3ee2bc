"""Bundles whose keys and values are rounded: whether a file computes just that, and what it costs."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fope_export.backends.base import empty_past, feeds_for
from fope_export.backends.choose import BACKENDS, USUALLY
from fope_export.backends.eager import EagerBackend
from fope_export.backends.openvino import OpenVinoBackend, PagedSlots
from fope_export.backends.ort_optimized import OptimizedOrtBackend, OrtSlots
from fope_export.bundle import Bundle
from fope_export.errors import BundleError
from fope_export.graph.caches import steps_in, steps_of
from fope_export.manifest import CALIBRATED_ON, ROUNDED_CACHE
from fope_export.model.decoder import Decoder, Step
from fope_export.model.tensors import read_array
from fope_export.parity.cases import Case
from fope_export.parity.copies import exact
from fope_export.parity.disk import Given, given
from fope_export.parity.judge import Floats
from fope_export.parity.quantized import Cost, change
from fope_export.parity.results import CaseResult, ControlResult
from fope_export.parity.sparing import SparingYardstick
from fope_export.parity.yardstick import Look
from fope_export.quantizations import CACHES, CacheRounding

MOST = 8
"""How many times as far as PyTorch's own rounding another order of summation may move what is then rounded."""
AGAIN = "Make it again with `fope-export optimize`."


@dataclass(frozen=True)
class CacheCost(Cost):
    """The bundle with rounded keys and values beside itself without, in one backend."""

    backend: str
    stray: ClassVar[str] = "are not what PyTorch gives"

    @property
    def what(self) -> str:
        return f"{self.kind} keys and values in {self.backend}"

    @property
    def limit(self) -> float:
        return CACHES[self.kind].growth


class Caches(NamedTuple):
    """What was found of a bundle's rounded caches; nothing where none are."""

    cases: tuple[CaseResult, ...] = ()
    controls: tuple[ControlResult, ...] = ()
    costs: tuple[CacheCost, ...] = ()


class Held(NamedTuple):
    """What a cache [B, K, L, E] holds: numbers, the steps that they are in, and how many of these fit; for every layer
    keys, then values.
    """

    numbers: Sequence[Floats]
    steps: Sequence[Floats]
    least: float
    largest: float

    def with_steps(self, steps: Sequence[Floats]) -> "Held":
        """The same integers read in other steps."""
        read = [x / own * other for x, own, other in zip(self.numbers, self.steps, steps, strict=True)]
        return self._replace(numbers=read, steps=steps)

    def off(self, new: Sequence[Floats]) -> Iterator[Floats]:
        """How many steps each number is from what should have been rounded."""
        for x, step, wanted in zip(self.numbers, self.steps, new, strict=True):
            yield abs(x - wanted.clip(self.least * step, self.largest * step)) / step


def caches_of(bundle: Bundle, chosen: str, yardstick: SparingYardstick, case: Case) -> Caches:
    """Whether a backend that rounds the bundle's caches gives in one case what PyTorch gives on the very keys and
    values that it then holds, whether these are PyTorch's, rounded, and what that costs. `yardstick` has the file's
    weights.

    A last digit decides which of two steps a number is rounded to, and a layer's other step moves all that come after
    it: so PyTorch is told what each layer holds, and nothing but rounding is left between the two.

    Raises BackendError when the bundle does not run.
    """
    row, variants = bundle.manifest.cache_rounding, BACKENDS[chosen].variants_of(bundle)
    if row is None or not variants[-1].cache:
        return Caches()
    *others, tested = variants
    with closing(others[-1].load(bundle, USUALLY)) as one, closing(tested.load(bundle, USUALLY)) as other:
        costs = change(bundle, one, other)
    got, held = _run(bundle, row, chosen, case)
    names = list(empty_past(bundle.manifest, 1))
    strays = [f"numbers of {name}" for name in _moved(names, yardstick, case, held)]
    if ROUNDED_CACHE in tested.files(bundle):
        strays += [f"steps of {name}" for name in misfits(bundle, row, yardstick.single)]
    with _reading(yardstick.single.model, held.numbers), _reading(yardstick.double.model, held.numbers):
        (look,) = yardstick.looks([case])
    result = CaseResult(
        f"{case.name}, {tested.name}", case.length, case.positions, len(case.steps), len(got.logits),
        look.judge(got.logits), look.own, got.seconds,
    )  # fmt: skip
    mistakes = tuple(_refusals(yardstick.single, case, look, held))
    return Caches((result,), mistakes, (CacheCost(row.name, *costs, tuple(strays), chosen),))


def _run(bundle: Bundle, row: CacheRounding, chosen: str, case: Case) -> tuple[Given, Held]:
    """Logits of the case, and what the cache holds after it; linear layers read their inputs as they are."""
    made: OpenVinoBackend | OptimizedOrtBackend
    if chosen == OpenVinoBackend.name:
        made = OpenVinoBackend(bundle, cache=True)
    else:
        with exact(bundle, ROUNDED_CACHE) as copied:
            made = OptimizedOrtBackend(copied, file=ROUNDED_CACHE)
    with closing(made):
        cache = made.empty_cache(len(case.feeds.input_ids))  # one memory, which every step writes
        fed: Any = SimpleNamespace(empty_cache=lambda batch: cache, step=made.step)
        got, slots = given(case, fed), cache.slots
        if isinstance(slots, PagedSlots):
            return got, _of_pages(slots, case.length)
        return got, _of_rows(slots, bundle, row, case.length)


def _of_rows(slots: OrtSlots, bundle: Bundle, row: CacheRounding, length: int) -> Held:
    """ONNX Runtime has integers, and the file their steps."""
    known = steps_in(bundle.path / ROUNDED_CACHE)
    steps: list[Floats] = [known[name].astype(np.float64)[None, :, None] for name in empty_past(bundle.manifest, 1)]
    numbers = [tensor[:, :, :length] * step for tensor, step in zip(slots.tensors, steps, strict=True)]
    return Held(numbers, steps, -row.largest - 1, row.largest)


def _of_pages(slots: PagedSlots, length: int) -> Held:
    """OpenVINO's pages begin each token's numbers of a head with their step, and which of them is zero."""
    numbers, steps = list[Floats](), list[Floats]()
    for tensor in slots.tensors:
        pages, (_, heads, _, width) = tensor.reshape(slots.count, -1, *tensor.shape[1:]), tensor.shape
        rows = pages.swapaxes(1, 2).reshape(slots.count, heads, -1, width)
        said = np.ascontiguousarray(rows[:, :, :length, :8]).view(np.float32).astype(np.float64)
        steps.append(said[..., :1])
        numbers.append((rows[:, :, :length, 8:] - said[..., 1:]) * said[..., :1])
    return Held(numbers, steps, -np.inf, np.inf)


@contextmanager
def _reading(model: Decoder, numbers: Sequence[Floats]) -> Iterator[list[list[Tensor]]]:
    """Attention reads these keys and values, whatever was computed: what that was is in the list, cache by cache."""
    parts = [torch.from_numpy(each).to(model.dtype) for each in numbers]
    computed: list[list[Tensor]] = [[] for _ in parts]

    def step_of(ids: Tensor, mask: Tensor, positions: Tensor, dtype: torch.dtype) -> Step:
        left = iter(zip(parts, computed, strict=True))

        def grow(past: Tensor, new: Tensor, written: Tensor) -> Tensor:  # noqa: ARG001
            part, seen = next(left)
            seen.append(new)
            return part[:, :, : mask.shape[1]]

        return Decoder.step_of(model, ids, mask, positions, dtype)._replace(grow=grow)

    vars(model)["step_of"] = step_of
    try:
        yield computed
    finally:
        del vars(model)["step_of"]


def _moved(names: Sequence[str], yardstick: SparingYardstick, case: Case, held: Held) -> Iterator[str]:
    """Caches that hold another number than the nearest to what PyTorch computes, but for its own rounding."""
    found = []
    for backend in (yardstick.single, yardstick.double):
        with _reading(backend.model, held.numbers) as computed:
            case.prefilled(backend)
        found.append([torch.cat(each, 2).double().numpy() for each in computed])
    single, double = found
    for name, step, noise, off in zip(
        names, held.steps, zip(single, double, strict=True), held.off(double), strict=True
    ):
        own = float((abs(noise[0] - noise[1]) / step).max())
        if not off.max() <= 0.5 + MOST * own:
            yield name


def misfits(bundle: Bundle, row: CacheRounding, single: EagerBackend) -> Iterator[str]:
    """Caches whose steps are not those that PyTorch finds on the tokens that they were measured on."""
    windows = np.array(read_array(bundle.path / CALIBRATED_ON, hint=AGAIN))
    if windows.ndim != 2 or windows.min() < 0 or windows.max() >= single.vocab_size:
        raise BundleError(f"{bundle.path / CALIBRATED_ON} holds no token ids [N, S]", hint=AGAIN)
    largest: dict[str, Floats] = {}
    names = list(empty_past(bundle.manifest, 1))
    for ids in windows:
        _, present = single.step(feeds_for(ids[None]), single.empty_cache(1), last=True)
        for name, tensor in zip(names, (each for layer in present for each in layer), strict=True):
            largest[name] = np.maximum(tensor.abs().amax((0, 2)).double().numpy(), largest.get(name, 0.0))
    known = steps_in(bundle.path / ROUNDED_CACHE)
    for name, values in largest.items():
        wanted = steps_of(row, values)
        if not (abs(known[name] / wanted - 1) * row.largest <= 0.5).all():
            yield name


def _refusals(single: EagerBackend, case: Case, look: Look, held: Held) -> Iterator[ControlResult]:
    """Steps that belong elsewhere, held against what PyTorch gives with the right ones: both must be refused."""
    layers, heads = len(held.steps) // 2, held.numbers[0].shape[1]
    for name, skipped, steps in (
        (
            "steps of another layer's cache",
            "" if layers > 1 else "the model has one layer",
            [*held.steps[2:], *held.steps[:2]],
        ),
        (
            "steps of two heads of the cache swapped",
            "" if heads > 1 else "keys and values have one head",
            [np.roll(x, 1, 1) for x in held.steps],
        ),
    ):
        if skipped:
            yield ControlResult(name, skipped, None)
            continue
        with _reading(single.model, held.with_steps(steps).numbers):
            yield ControlResult(name, "", look.judge(case.prefilled(single)))
