"""The bundle's second file, for ONNX Runtime alone (`graph.optimise`): a cache in place, and no padding at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from fope_export.backends.base import Feeds, Ids, Logits, Part, empty_past, widest
from fope_export.backends.memory import Array, Device, Host
from fope_export.backends.ort import TYPES, failure, session_of
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, require
from fope_export.manifest import KEPT, OPTIMISED

BLOCK = 256
"""Tokens that a cache grows by at least."""
LOGITS = "logits"


@dataclass
class Memory:
    """Keys and values [B, K, C, E] of every layer, written in place, for all caches that come from one another."""

    device: Device
    tensors: list[Array]
    bound: "Bound | None" = None
    """For single tokens in all rows, once there was such a step; it goes when the tensors do."""

    def reserve(self, tokens: int) -> None:
        """Make room for as many tokens in every row; what is there stays."""
        have = self.tensors[0].shape[2]
        if tokens <= have:
            return
        self.bound = None
        room = max(-(-tokens // BLOCK) * BLOCK, 2 * have)
        for i, old in enumerate(self.tensors):
            self.tensors[i] = new = self.device.zeros((*old.shape[:2], room, old.shape[3]))
            new[:, :, :have] = old


class SharedCache(NamedTuple):
    """A memory, and how many tokens of each of its rows are this cache's."""

    memory: Memory
    lengths: Ids  # [B]


class Bound:
    """All that a step of some shape reads and writes, bound to a session: to run another is to write its numbers.

    On a GPU, steps through the same Bound are the same work at the same places, which a CUDA graph can repeat.
    """

    def __init__(
        self, session: Any, device: Device, tensors: Sequence[Array], tokens: int, width: int, vocab_size: int, *,
        last: bool, graph: int | None = None,
    ) -> None:  # fmt: skip
        """For `tokens` in each row and a mask of `width`, over keys and values [B, K, C, E] on a device. `graph` is the
        CUDA graph to be captured, -1 for none, where the session captures any.
        """
        rows, self._device = len(tensors[0]), device
        shapes = {"input_ids": tokens, "attention_mask": width, "position_ids": tokens}
        self._hosts: dict[str, Any] = {name: np.zeros((rows, size), np.int64) for name, size in shapes.items()}
        self._hosts[KEPT] = np.arange(-1 if last else -tokens, 0)
        self._inputs = {name: device.placed(host) for name, host in self._hosts.items()}
        self._places, self._new = np.arange(width), np.arange(width) >= width - tokens
        self._session, self._binding, self._options = session, session.io_binding(), None
        for name, tensor in self._inputs.items():
            self._binding.bind_input(name, *device.binding(tensor))
        pasts = [port.name for port in session.get_inputs() if port.type in TYPES]
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
        """Tokens [B, S], each row's after `past` [B] others."""
        self._hosts["input_ids"][:], self._hosts["position_ids"][:] = ids, positions
        self._hosts["attention_mask"][:] = (self._places < past[:, None]) | self._new
        self._device.upload(self._hosts, self._inputs)
        self._session.run_with_iobinding(self._binding, self._options)
        found: Logits
        if self._logits is None:
            found = self._binding.get_outputs()[-1].numpy()
        else:
            found = self._device.read(self._logits)
            if found is self._logits:  # it is the caller's; the next step's has a place of its own
                self._logits = np.empty_like(found)
                self._binding.bind_output(LOGITS, *self._device.binding(self._logits))
        return found.astype(np.float32, copy=False)


class OptimisedOrtBackend:
    """A bundle's optimised file in ONNX Runtime.

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
    ) -> None:
        """`device` is cpu or cuda, and caches stay on it. `cuda_graph` captures a graph of decoding in each cache and
        repeats it.

        Raises BackendError when ONNX Runtime is not there, does not load the file, or not for that device.
        """
        self.vocab_size = bundle.manifest.decoder().vocab_size
        self.name, self._manifest, self._path = "onnxruntime", bundle.manifest, bundle.path / OPTIMISED
        # It would warn that an input has a default value.
        self._session = session_of(
            bundle, OPTIMISED, threads=threads, device=device, spoken=False, cuda_graph=cuda_graph
        )  # fmt: skip
        self._graphs = count(1) if cuda_graph else None
        kind = next(TYPES[port.type] for port in self._session.get_inputs() if port.type in TYPES)
        self._device = _device(device, kind)

    def empty_cache(self, batch: int, room: int = 0) -> SharedCache:
        shapes = empty_past(self._manifest, batch).values()
        memory = Memory(self._device, [self._device.zeros(shape) for shape in shapes])
        memory.reserve(room)
        return SharedCache(memory, np.zeros(batch, np.int64))

    def assemble(self, parts: Sequence[Part], room: int = 0) -> SharedCache:
        cache = self.empty_cache(len(parts), max(room, widest(parts)))
        for row, part in enumerate(parts):
            cache.lengths[row] = count = part.end - part.start
            for tensor, source in zip(cache.memory.tensors, part.cache.memory.tensors, strict=True):
                tensor[row, :, :count] = source[part.row, :, :count]
        return cache

    def step(self, feeds: Feeds, cache: SharedCache, *, last: bool = False) -> tuple[Logits, SharedCache]:
        memory, (batch, new) = cache.memory, feeds.input_ids.shape
        real = feeds.attention_mask[:, -new:] != 0
        counts = np.count_nonzero(real, axis=1)
        past = np.count_nonzero(feeds.attention_mask, axis=1) - counts
        if (past != cache.lengths).any() or (real[:, :-1] > real[:, 1:]).any():
            raise BackendError(
                "the attention mask does not fit the cache",
                hint="New tokens are padded on the left, and the mask covers the past as it was fed.",
            )
        memory.reserve(int((past + counts).max()))
        if new == 1 and counts.all():
            if memory.bound is None:
                graph = next(self._graphs) if self._graphs else None
                memory.bound = self._bind(memory.tensors, 1, memory.tensors[0].shape[2], last=True, graph=graph)
            logits = self._run(memory.bound, feeds.input_ids, feeds.position_ids, past)
        else:
            logits = np.zeros((batch, 1 if last else new, self.vocab_size), np.float32)
            for row, tokens in enumerate(counts):
                if tokens:
                    ids, positions = (x[row : row + 1, new - tokens :] for x in (feeds.input_ids, feeds.position_ids))
                    tensors, before = [tensor[row : row + 1] for tensor in memory.tensors], past[row : row + 1]
                    graph = -1 if self._graphs else None
                    bound = self._bind(tensors, tokens, int(before[0] + tokens), last=last, graph=graph)
                    logits[row, -1 if last else -tokens :] = self._run(bound, ids, positions, before)
        return logits, SharedCache(memory, past + counts)

    def _bind(self, tensors: Sequence[Array], tokens: int, width: int, *, last: bool, graph: int | None) -> Bound:
        return Bound(self._session, self._device, tensors, tokens, width, self.vocab_size, last=last, graph=graph)

    def _run(self, bound: Bound, ids: Ids, positions: Ids, past: Ids) -> Logits:
        try:
            return bound.run(ids, positions, past)
        except Exception as cause:
            raise failure("run", self._path, cause) from cause


def _device(name: str, kind: type[np.generic]) -> Device:
    if name == "cpu":
        return Host(kind)
    from fope_export.backends.cuda import Cuda

    return Cuda(kind)
