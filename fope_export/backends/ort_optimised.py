"""The bundle's second file, for ONNX Runtime alone (`graph.optimise`): a cache in place, and no padding at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fope_export.backends.base import Feeds, Ids, Logits, Part, empty_past, widest
from fope_export.backends.ort import TYPES, failure, session_of
from fope_export.bundle import KEPT, OPTIMISED, Bundle
from fope_export.errors import BackendError, require

BLOCK = 256
"""Tokens that a cache grows by at least."""
LOGITS = "logits"


@dataclass
class Memory:
    """Keys and values [B, K, C, E] of every layer, written in place, for all caches that come from one another."""

    tensors: list[Tensor]
    binding: Any = None
    """Of all rows to a session, once there was a step with them; it goes when the tensors do."""

    def reserve(self, tokens: int) -> None:
        """Make room for as many tokens in every row; what is there stays."""
        have = self.tensors[0].shape[2]
        if tokens <= have:
            return
        self.binding = None
        room = max(-(-tokens // BLOCK) * BLOCK, 2 * have)
        for i, old in enumerate(self.tensors):
            self.tensors[i] = new = zeros((*old.shape[:2], room, old.shape[3]), old)
            new[:, :, :have] = old


class SharedCache(NamedTuple):
    """A memory, and how many tokens of each of its rows are this cache's."""

    memory: Memory
    lengths: Ids  # [B]


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Of the dtype and on the device of `like`; on a host, what is never written takes no memory, unlike torch's."""
    kind = np.float16 if like.dtype == torch.float16 else np.float32
    return torch.from_numpy(np.zeros(shape, kind)).to(like.device)


class OptimisedOrtBackend:
    """A bundle's optimised file in ONNX Runtime.

    Prompts run row by row without their padding; single tokens run together, each row at its own length.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0, device: str = "cpu", exact: bool = False) -> None:
        """`device` is cpu or cuda, and caches stay on it. `exact` does not round activations, if the file does, and
        shows that nothing else is different.

        Raises BackendError when ONNX Runtime is not there, does not load the file, or not for that device.
        """
        self.vocab_size = bundle.manifest.decoder().vocab_size
        self.name, self._manifest, self._path = "onnxruntime", bundle.manifest, bundle.path / OPTIMISED
        self._value = require("onnxruntime", "cpu").OrtValue.ortvalue_from_numpy
        # It would warn that an input has a default value.
        self._session = session_of(bundle, OPTIMISED, threads=threads, device=device, spoken=False, exact=exact)
        types = {port.name: TYPES[port.type] for port in self._session.get_inputs() if port.type in TYPES}
        self._past, self._type = list(types), next(iter(types.values()))
        self._present = [port.name for port in self._session.get_outputs() if port.name != LOGITS]
        self._device, self._like = device, torch.from_numpy(np.zeros(0, self._type)).to(device)

    def empty_cache(self, batch: int, room: int = 0) -> SharedCache:
        shapes = empty_past(self._manifest, batch).values()
        memory = Memory([zeros(shape, self._like) for shape in shapes])
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
        counts = real.sum(axis=1)
        past = (feeds.attention_mask[:, :-new] != 0).sum(axis=1)
        if (past != cache.lengths).any() or (np.diff(real.astype(int), axis=1) < 0).any():
            raise BackendError(
                "the attention mask does not fit the cache",
                hint="New tokens are padded on the left, and the mask covers the past as it was fed.",
            )
        memory.reserve(int((past + counts).max()))
        if new == 1 and counts.all():
            memory.binding = memory.binding or self._bind(memory.tensors)
            logits = self._run(feeds.input_ids, feeds.position_ids, past, memory.binding, 1)
        else:
            logits = np.zeros((batch, 1 if last else new, self.vocab_size), np.float32)
            for row, count in enumerate(counts):
                if count:
                    kept = 1 if last else count
                    ids, positions = (x[row : row + 1, new - count :] for x in (feeds.input_ids, feeds.position_ids))
                    binding = self._bind([tensor[row : row + 1] for tensor in memory.tensors])
                    logits[row, -kept:] = self._run(ids, positions, past[row : row + 1], binding, kept)
        return logits, SharedCache(memory, past + counts)

    def _bind(self, tensors: list[Tensor]) -> Any:
        """Keys and values, read and written where they are."""
        binding = self._session.io_binding()
        for past_name, present_name, tensor in zip(self._past, self._present, tensors, strict=True):
            place = (self._device, 0, self._type, tuple(tensor.shape), tensor.data_ptr())
            binding.bind_input(past_name, *place)
            binding.bind_output(present_name, *place)
        return binding

    def _run(self, ids: Ids, positions: Ids, past: Ids, binding: Any, kept: int) -> Logits:
        """Rows of equally many new tokens [B, S], each after `past` [B] others, on the cache that is bound."""
        places, longest = np.arange(past.max() + ids.shape[1]), past.max()
        mask = (places < past[:, None]) | (places >= longest)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
            "position_ids": positions,
            KEPT: np.array([kept]),
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._value(np.ascontiguousarray(array)))
        logits = np.empty((len(ids), 1, self.vocab_size), self._type)
        if kept == 1:
            binding.bind_output(LOGITS, "cpu", 0, self._type, logits.shape, logits.ctypes.data)
        else:  # the file declares one, so that no other number may be bound
            binding.bind_output(LOGITS)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as cause:
            raise failure("run", self._path, cause) from cause
        if kept > 1:
            logits = binding.get_outputs()[-1].numpy()
        return logits.astype(np.float32, copy=False)
