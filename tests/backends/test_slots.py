"""Slots of every backend: a row's logits are those of its tokens alone, whatever happens beside it."""

import shutil
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest

from fope_export.backends.base import Backend, Logits, Piece, Slots, Together, feeds_for
from fope_export.backends.choose import Settings, load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.ort import OrtBackend
from fope_export.backends.ort_optimized import OptimizedOrtBackend
from fope_export.backends.stacked import StackedSlots
from fope_export.bundle import Bundle
from fope_export.errors import BackendError
from fope_export.graph.optimize import optimize
from fope_export.model.decoder import Decoder
from tests.support import same_function, truth_of

KINDS = ["portable", "optimized", "static", "openvino", "torch"]


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest, bundle: Bundle, static_bundle: Bundle, optimized: Bundle) -> Backend:
    if request.param == "torch":
        return load_backend(bundle, "torch")
    if request.param == "openvino":
        return load_backend(optimize(optimized, "openvino"), "openvino")
    made = {"portable": bundle, "static": static_bundle, "optimized": optimized}[request.param]
    return load_backend(made, settings=Settings(optimized=request.param == "optimized"))


@pytest.fixture(scope="module")
def optimized(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return optimize(Bundle.open(shutil.copytree(bundle.path, tmp_path_factory.mktemp("optimized") / "bundle")))


class Watched:
    """Slots whose every answer is compared with the tokens that each row holds."""

    def __init__(self, slots: Slots, decoder: Decoder) -> None:
        self.slots, self.decoder, self.plain = slots, decoder, EagerBackend(decoder)
        self.held: list[list[int]] = [[] for _ in range(slots.count)]

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> None:
        self.held[slot] = [*self.held[slot][:start], *ids]
        self._same(self.slots.prefill(slot, np.array(ids), start), [slot])

    def prefill_together(self, *pieces: tuple[int, Sequence[int], int]) -> None:
        for slot, ids, start in pieces:
            self.held[slot] = [*self.held[slot][:start], *ids]
        assert isinstance(self.slots, Together)
        logits = self.slots.prefill_together([Piece(slot, np.array(ids), start) for slot, ids, start in pieces])
        self._same(logits, [slot for slot, *_ in pieces])

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        for slot, token in zip(slots, tokens, strict=True):
            self.held[slot].append(token)
        self._same(self.slots.decode(slots, tokens), slots)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.slots.copy(source, target, tokens)
        self.held[target] = self.held[source][:tokens]

    def _same(self, got: Logits, slots: Sequence[int]) -> None:
        assert got.shape == (len(slots), self.decoder.config.vocab_size) and got.dtype == np.float32
        for row, slot in zip(got, slots, strict=True):
            ids = np.array([self.held[slot]])
            wanted, _ = self.plain.step(feeds_for(ids), self.plain.empty_cache(1))
            same_function(row, wanted[0, -1], truth_of(self.decoder, ids)[0, -1])


def test_rows_come_and_go(backend: Backend, decoder: Decoder) -> None:
    rows = Watched(backend.slots(3), decoder)
    rows.prefill(1, [5, 6, 7, 8], 0)
    rows.decode([1], [9])
    rows.prefill(0, [3], 0)
    rows.decode([1, 0], [2, 4])  # in any order
    rows.prefill(2, list(range(20, 40)), 0)
    rows.prefill(2, [8, 9], 20)  # its next chunk
    rows.decode([0, 2], [6, 7])
    rows.decode([2], [1])
    rows.decode([0, 1, 2], [5, 5, 5])
    rows.slots.free(1)
    for token in (4, 3):
        rows.decode([0, 2], [token, 9])
    rows.prefill(1, [7, 7], 0)
    rows.decode([0, 1, 2], [1, 2, 3])


def test_a_row_is_cut_and_copied(backend: Backend, decoder: Decoder) -> None:
    rows = Watched(backend.slots(2), decoder)
    rows.prefill(0, [5, 6, 7, 8, 9], 0)
    rows.copy(0, 1, 3)
    rows.prefill(1, [1, 2], 3)
    rows.prefill(0, [4], 2)  # in the place of the last three
    rows.decode([0, 1], [8, 8])
    rows.copy(1, 0, 6)
    rows.decode([0, 1], [2, 3])
    rows.prefill(0, [1, 1], 4)
    rows.decode([1], [6])
    rows.decode([1, 0], [5, 5])


@pytest.mark.parametrize("backend", ["openvino"], indirect=True)
@pytest.mark.parametrize("whole", [False, True])
def test_rows_are_fed_together(backend: Backend, decoder: Decoder, whole: bool) -> None:
    slots = Watched(backend.slots(4, whole=whole), decoder)
    slots.prefill_together((2, [1, 2, 3], 0), (0, [*range(40)], 0))
    slots.prefill(1, [9, 8], 0)
    slots.prefill_together((0, [7], 33), (3, [5, 6], 0), (2, [4, 4], 3))
    slots.decode([0, 1, 2, 3], [1, 2, 3, 4])


def test_a_row_that_rests_while_others_go_on_is_as_it_was(backend: Backend, decoder: Decoder) -> None:
    rows = Watched(backend.slots(4), decoder)
    for slot in range(4):
        rows.prefill(slot, [slot + 1] * (5 - slot), 0)
    rows.decode([0, 1, 2, 3], [9, 9, 9, 9])
    for _ in range(3):
        rows.decode([0, 3], [7, 7])
    rows.decode([1, 2], [4, 5])
    rows.decode([3], [6])
    rows.decode([3, 2, 1, 0], [1, 2, 3, 4])


def test_a_cache_grows_with_what_is_in_it(optimized: Bundle, decoder: Decoder) -> None:
    rows = Watched(load_backend(optimized).slots(3), decoder)
    rows.prefill(0, [n % 250 + 1 for n in range(250)], 0)
    rows.prefill(2, [5, 6, 7], 0)
    for token in range(8):  # past 256
        rows.decode([0, 2], [token, token])
    rows.prefill(1, [9] * 300, 0)
    rows.prefill(1, [8] * 300, 300)  # past 512
    rows.decode([0, 1, 2], [1, 2, 3])


def test_a_failed_step_leaves_those_that_rest_as_they_were(optimized: Bundle, decoder: Decoder) -> None:
    backend = load_backend(optimized)
    assert isinstance(backend, OptimizedOrtBackend)
    rows, run = Watched(backend.slots(3), decoder), backend.run
    for slot in range(3):
        rows.prefill(slot, [slot + 1, 7, 8], 0)

    def failing(*given: Any) -> Logits:
        run(*given)
        raise BackendError("out of memory", hint="Ask for less.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "run", failing)
        with pytest.raises(BackendError, match="out of memory"):
            rows.slots.decode([0, 2], [9, 9])
    rows.decode([1], [4])


def test_a_cache_grows_whole_or_not(optimized: Bundle, decoder: Decoder) -> None:
    backend = load_backend(optimized)
    assert isinstance(backend, OptimizedOrtBackend)
    rows, made, zeros = Watched(backend.slots(1, 256), decoder), count(1), backend.device.zeros

    def scarce(shape: tuple[int, ...]) -> Any:
        if next(made) == 3:
            raise MemoryError
        return zeros(shape)

    rows.prefill(0, [5] * 250, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.device, "zeros", scarce)
        with pytest.raises(MemoryError):
            rows.slots.prefill(0, np.full(50, 6), 250)
    rows.prefill(0, [6] * 50, 250)  # there is memory again


def test_rows_left_behind_keep_no_more_than_their_own(bundle: Bundle) -> None:
    slots = StackedSlots(OrtBackend(bundle), 3)
    for slot in range(3):
        slots.prefill(slot, np.array([5] * (slot + 1)), 0)
    slots.decode([0, 1, 2], [1, 1, 1])
    slots.decode([0], [1])  # too few to carry two others along
    kept = [part.cache[0].shape() for part in slots._parts if part]
    assert [(rows, tokens) for rows, _, tokens, _ in kept] == [(1, 3), (1, 3), (1, 4)]


def test_logits_of_every_token_of_a_prompt(backend: Backend, decoder: Decoder) -> None:
    slots, ids = backend.slots(1), np.array([5, 6, 7, 8])
    got = np.concatenate([slots.prefill(0, ids[:3], 0, last=False), slots.prefill(0, ids[3:], 3, last=False)])
    plain = EagerBackend(decoder)
    wanted, _ = plain.step(feeds_for(ids[None]), plain.empty_cache(1))
    same_function(got, wanted[0], truth_of(decoder, ids[None])[0])


def test_logits_belong_to_the_caller(backend: Backend) -> None:
    slots = backend.slots(2)
    first = slots.prefill(0, np.array([5, 6]), 0), slots.prefill(1, np.array([7]), 0), slots.decode([0, 1], [3, 4])
    kept = [logits.copy() for logits in first]
    slots.decode([0, 1], [9, 9])
    for logits, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(logits, before)


def test_several_slots_of_one_backend_do_not_meet(backend: Backend, decoder: Decoder) -> None:
    one, other = (Watched(backend.slots(1), decoder) for _ in range(2))
    one.prefill(0, [5, 6, 7], 0)
    other.prefill(0, [9, 8], 0)
    one.decode([0], [3])
    one.slots.close()
    other.decode([0], [4])


def test_a_static_cache_is_full(static_bundle: Bundle) -> None:
    slots = load_backend(static_bundle).slots(2)
    assert slots.capacity
    slots.prefill(0, np.ones(slots.capacity - 1, np.int64), 0)
    slots.prefill(1, np.array([7]), 0)
    slots.decode([0, 1], [1, 1])
    with pytest.raises(BackendError, match=f"{slots.capacity + 1} tokens do not fit"):
        slots.decode([0], [1])
    slots.decode([1], [1])  # which has not as many
