"""The bundle's second file, for ONNX Runtime alone (`graph.optimize`): a cache in place, and no padding at all."""

from collections.abc import Sequence
from contextlib import closing
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from fope_export.backends.base import Feeds, Ids, Logits, axes_of, by_axis, counts_of, empty_past
from fope_export.backends.memory import Array, Device, Host
from fope_export.backends.ort import TYPES, failure, session_of
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, require
from fope_export.manifest import KEPT
from fope_export.quantizations import CACHES

TILE, SAMPLE = 16, 48
"""Rows that a kernel takes together, at most, and steps that rows are compared in."""
BLOCK = 256
"""Tokens that a cache grows by at least."""
LOGITS = "logits"
KINDS = TYPES | {f"tensor({each})": getattr(np, each) for each in (row.element.lower() for row in CACHES.values())}
"""NumPy's, by ONNX Runtime's names: of logits and caches."""


class Bound:
    """All that a step of some shape reads and writes, bound to a session: to run another is to write its numbers.

    On a GPU, steps through the same Bound are the same work at the same places, which a CUDA graph can repeat.
    """

    def __init__(
        self, session: Any, device: Device, tensors: Sequence[Array], tokens: int, width: int, vocab_size: int, *,
        last: bool, axes: int | None, graph: int | None = None,
    ) -> None:  # fmt: skip
        """For `tokens` in each row and a mask of `width`, over keys and values [B, K, C, E] on a device. `axes` are
        those of the graph's positions, None where there is one. `graph` is the CUDA graph to be captured, -1 for none,
        where the session captures any.
        """
        rows, self._device = len(tensors[0]), device
        shapes = {"input_ids": tokens, "attention_mask": width, "position_ids": tokens}
        self._hosts: dict[str, Any] = {name: np.zeros((rows, size), np.int64) for name, size in shapes.items()}
        self._axes = axes
        if axes:
            self._hosts["position_ids"] = np.zeros((axes, rows, tokens), np.int64)
        self._hosts[KEPT] = np.arange(-1 if last else -tokens, 0)
        self._inputs = {name: device.placed(host) for name, host in self._hosts.items()}
        self._places, self._new = np.arange(width), np.arange(width) >= width - tokens
        self._session, self._binding, self._options = session, session.io_binding(), None
        for name, tensor in self._inputs.items():
            self._binding.bind_input(name, *device.binding(tensor))
        pasts = [port.name for port in session.get_inputs() if port.name not in self._hosts]
        presents = [port.name for port in session.get_outputs() if port.name != LOGITS]
        for past, present, tensor in zip(pasts, presents, tensors, strict=True):
            self._binding.bind_input(past, *device.binding(tensor))
            self._binding.bind_output(present, *device.binding(tensor))
        self._logits = device.zeros((rows, 1, vocab_size)) if last else None
        if self._logits is not None:
            self._binding.bind_output(LOGITS, *device.binding(self._logits))
        else:  # the file declares one token's, so that no other number may be bound
            self._binding.bind_output(LOGITS)
        if graph is not None:
            self._options = require("onnxruntime", "run").RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(graph))

    def run(self, ids: Ids, positions: Ids, past: Ids) -> Logits:
        """Tokens [B, S] at positions [B, S] or [B, S, A], each row's after `past` [B] others."""
        self._hosts["input_ids"][:], self._hosts["position_ids"][:] = ids, by_axis(positions, self._axes)
        self._hosts["attention_mask"][:] = (self._places < past[:, None]) | self._new
        self._device.upload(self._hosts, self._inputs)
        self._session.run_with_iobinding(self._binding, self._options)
        logits: Logits
        if self._logits is None:
            logits = self._binding.get_outputs()[-1].numpy()
        else:
            logits = self._device.read(self._logits)
            if logits is self._logits:  # it is the caller's; the next step's has a place of its own
                self._logits = np.empty_like(logits)
                self._binding.bind_output(LOGITS, *self._device.binding(self._logits))
        return logits.astype(np.float32, copy=False)


class Decoding(NamedTuple):
    """What steps of one token in each of some rows have in common."""

    place: tuple[int, int, int]  # first row, rows, width of the mask
    bound: Bound
    graph: int | None
    """The CUDA graph that repeats it."""


class OrtSlots:
    """Keys and values [B, K, C, E] of every layer, written in place; C grows when a row needs it.

    A step runs the rows from the first to the last that it names. One between them that it does not name is fed a first
    token that nobody reads, which costs no attention, and is given its own back.
    """

    capacity: int | None = None

    def __init__(self, backend: "OptimizedOrtBackend", count: int, room: int, *, rows: int = 0) -> None:
        """With `rows` there are as many in memory, at least `count`, and every step of single tokens runs all."""
        self._rows, self._whole = rows or count, rows > 0 or backend.graphs is not None
        self.count, self.lengths, self._backend = count, np.zeros(self._rows, np.int64), backend
        self.tensors = backend.memory(self._rows)
        self._decoding: Decoding | None = None
        self._reserve(room)

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        positions, past = np.arange(start, start + len(ids)), np.array([start])
        logits = self.run(slot, ids[None], positions[None], past, last=last)
        self.lengths[slot] = start + len(ids)
        return logits.reshape(-1, self._backend.vocab_size)

    def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
        low, high = (0, self._rows) if self._whole else (min(slots), max(slots) + 1)
        ids, past, named = np.zeros(self._rows, np.int64), np.zeros(self._rows, np.int64), list(slots)
        ids[named], past[named] = tokens, self.lengths[named]
        resting = [row for row in range(low, high) if row not in slots and self.lengths[row]]
        firsts = [tensor[resting, :, 0] for tensor in self.tensors] if resting else []
        try:
            logits = self.run(low, ids[low:high, None], past[low:high, None], past[low:high], last=True)
        finally:
            for first, tensor in zip(firsts, self.tensors, strict=False):
                tensor[resting, :, 0] = first
        self.lengths[named] += 1
        return logits.reshape(high - low, -1).take([row - low for row in named], axis=0)

    def run(self, low: int, ids: Ids, positions: Ids, past: Ids, *, last: bool) -> Logits:
        """Tokens [N, S] for the rows from `low` on, each row's after `past` [N] others; S is 1 where N is not."""
        rows, new = ids.shape
        total = int(past.max()) + new
        self._reserve(total)
        if new == 1 and (rows == self._rows or not self._backend.graphs):
            bound = self._single(low, rows, total)
        else:
            bound = self._bind(low, rows, new, total, last=last)
        return self._backend.run(bound, ids, positions, past)

    def _single(self, low: int, rows: int, total: int) -> Bound:
        """For one token in each row; the same as in the last step wherever it can be."""
        room = self.tensors[0].shape[2]
        place = low, rows, room if self._backend.graphs else min(-(-total // BLOCK) * BLOCK, room)
        if self._decoding is None or self._decoding.place != place:
            self._release()
            graph = self._backend.graphs.take() if self._backend.graphs else None
            bound = self._bind(low, rows, 1, place[-1], last=True, graph=graph)
            self._decoding = Decoding(place, bound, graph)
        return self._decoding.bound

    def _bind(self, low: int, rows: int, new: int, width: int, *, last: bool, graph: int | None = None) -> Bound:
        return self._backend.bind([tensor[low : low + rows] for tensor in self.tensors], new, width, last, graph)

    def _reserve(self, tokens: int) -> None:
        """Make room for as many tokens in every row; what is there stays."""
        have = self.tensors[0].shape[2]
        if tokens <= have:
            return
        room, grown = max(-(-tokens // BLOCK) * BLOCK, 2 * have), []
        for old in self.tensors:
            new = self._backend.device.zeros((*old.shape[:2], room, old.shape[3]))
            for row, length in enumerate(self.lengths):
                new[row, :, :length] = old[row, :, :length]
            grown.append(new)
        self._release()
        self.tensors[:] = grown

    def _release(self) -> None:
        """The next decoding has other rows or another memory."""
        if self._decoding and self._backend.graphs and self._decoding.graph:
            self._backend.graphs.give_back(self._decoding.graph)
        self._decoding = None

    def copy(self, source: int, target: int, tokens: int) -> None:
        for tensor in self.tensors if source != target else ():
            tensor[target, :, :tokens] = tensor[source, :, :tokens]
        self.lengths[target] = tokens

    def free(self, slot: int) -> None:
        self.lengths[slot] = 0

    def close(self) -> None:
        self._release()
        self.tensors.clear()


class SharedCache(NamedTuple):
    """Slots, and how many tokens of each of their rows are this cache's."""

    slots: OrtSlots
    lengths: Ids  # [B]


class Graphs:
    """The numbers of a session's CUDA graphs: one that is given back is forgotten there, and taken again."""

    def __init__(self, session: Any) -> None:
        self._session, self._free, self._new = session, list[int](), count(1)

    def take(self) -> int:
        return self._free.pop() if self._free else next(self._new)

    def give_back(self, graph: int) -> None:
        """Where ONNX Runtime cannot forget a graph, its number is not used again."""
        if release := getattr(self._session, "release_captured_graph", None):
            release(graph)
            self._free.append(graph)


class OptimizedOrtBackend:
    """A bundle's optimized file in ONNX Runtime.

    Prompts run row by row without their padding; single tokens run together, each row at its own length.
    """

    chunk = 256  # half of what it computes in a chunk's own triangle is thrown away

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        device: str = "cpu",
        cuda_graph: bool = False,
        file: str = "",
    ) -> None:
        """`device` is cpu or cuda, and caches stay on it. `cuda_graph` captures a graph of decoding in each cache and
        repeats it. `file` is another of the bundle's that takes the same, as ROUNDED_CACHE.

        Raises BackendError when ONNX Runtime is not there, does not load the file, or not for that device.
        """
        self.vocab_size = bundle.manifest.decoder().vocab_size
        self.name, self._manifest = "onnxruntime", bundle.manifest
        file = file or bundle.manifest.optimized
        self._path = bundle.path / file
        # It would warn that an input has a default value.
        self._session = session_of(
            bundle, file, threads=threads, device=device, spoken=False, cuda_graph=cuda_graph
        )  # fmt: skip
        self.graphs = Graphs(self._session) if cuda_graph else None
        logits, *presents = (port.type for port in self._session.get_outputs())
        self._fed, self.device = (_device(device, KINDS[each]) for each in (logits, presents[0]))

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> OrtSlots:
        return OrtSlots(self, count, room, rows=self._alike(count) if whole else 0)

    def _alike(self, count: int) -> int:
        """The fewest rows, at least `count`, that all compute the same: the last of a tile are rounded otherwise.

        Raises BackendError where some always differ.
        """
        sample = np.random.default_rng(0).integers(0, self.vocab_size, SAMPLE)
        for rows in range(count, count + TILE):
            with closing(OrtSlots(self, rows, BLOCK, rows=rows)) as slots:
                for row in range(rows):
                    slots.prefill(row, sample[:1], 0)
                steps = (slots.decode(range(rows), [token] * rows) for token in sample)
                if all((logits == logits[0]).all() for logits in steps):
                    return rows
        raise BackendError(
            f"rows {count} to {count + TILE - 1} of a step are not all rounded alike by this processor's kernels",
            hint="Leave --batch-invariant out.",
        )

    def empty_cache(self, batch: int) -> SharedCache:
        return SharedCache(self.slots(batch), np.zeros(batch, np.int64))

    def step(self, feeds: Feeds, cache: SharedCache, *, last: bool = False) -> tuple[Logits, SharedCache]:
        slots, (batch, new) = cache.slots, feeds.input_ids.shape
        counts, past = counts_of(feeds, cache.lengths)
        slots.lengths[:] = past
        logits = np.zeros((batch, 1 if last else new, self.vocab_size), np.float32)
        if new == 1:
            logits[counts > 0] = slots.run(0, feeds.input_ids, feeds.position_ids, past, last=True)[counts > 0]
        else:
            for row, tokens in enumerate(counts):
                if tokens:
                    ids, positions = (x[row : row + 1, new - tokens :] for x in (feeds.input_ids, feeds.position_ids))
                    kept = slots.run(row, ids, positions, past[row : row + 1], last=last)
                    logits[row, -1 if last else -tokens :] = kept
        return logits, SharedCache(slots, past + counts)

    def close(self) -> None:
        self.graphs = None
        del self._session

    def memory(self, rows: int) -> list[Array]:
        """Keys and values of every layer, with room for no token."""
        return [self.device.zeros(shape) for shape in empty_past(self._manifest, rows).values()]

    def bind(self, tensors: Sequence[Array], tokens: int, width: int, last: bool, graph: int | None) -> Bound:
        """See `Bound`; without a number nothing is captured."""
        graph = -1 if self.graphs and graph is None else graph
        return Bound(
            self._session, self._fed, tensors, tokens, width, self.vocab_size,
            last=last, axes=axes_of(self._manifest), graph=graph,
        )  # fmt: skip

    def run(self, bound: Bound, ids: Ids, positions: Ids, past: Ids) -> Logits:
        """Raises BackendError with what ONNX Runtime says."""
        try:
            return bound.run(ids, positions, past)
        except Exception as cause:
            raise failure("run", self._path, cause) from cause


def _device(name: str, kind: type[np.generic]) -> Device:
    if name == "cpu":
        return Host(kind)
    from fope_export.backends.cuda import Cuda

    return Cuda(kind)
