"""The bundle's second file, for ONNX Runtime alone (`graph.optimise`): a cache in place, and no padding at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Feeds, Ids, Logits, Part, empty_past, widest
from fope_export.backends.ort import TYPES, failure, session_of
from fope_export.bundle import OPTIMISED, Bundle
from fope_export.errors import BackendError, require

BLOCK = 256
"""Tokens that a cache grows by at least."""
LOGITS, KEPT = "logits", "logits_to_keep"


@dataclass
class SharedCache:
    """Keys and values [B, K, C, E] of every layer, written in place, and the tokens in each row, which are C at most.
    What grows is replaced in the list, for every cache that shares it.
    """

    arrays: list[NDArray[Any]]
    lengths: Ids  # [B]

    def reserve(self, tokens: int) -> None:
        """Make room for as many tokens in every row; what is there stays. Untouched memory costs nothing."""
        have = self.arrays[0].shape[2]
        if tokens <= have:
            return
        room = max(-(-tokens // BLOCK) * BLOCK, 2 * have)
        for i, old in enumerate(self.arrays):
            self.arrays[i] = new = np.zeros((*old.shape[:2], room, old.shape[3]), old.dtype)
            new[:, :, :have] = old


class OptimisedOrtBackend:
    """A bundle's optimised file in ONNX Runtime on the CPU.

    Prompts run row by row without their padding; single tokens run together, each row at its own length.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0, exact: bool = False) -> None:
        """`exact` does not round activations, if the file does, and shows that nothing else is different.

        Raises BackendError when ONNX Runtime is not there, or does not load the file."""
        self.vocab_size = bundle.manifest.decoder().vocab_size
        self.name, self._manifest, self._path = "onnxruntime", bundle.manifest, bundle.path / OPTIMISED
        self._value = require("onnxruntime", "cpu").OrtValue.ortvalue_from_numpy
        # It would warn that an input has a default value.
        self._session = session_of(bundle, OPTIMISED, threads=threads, spoken=False, exact=exact)
        types = {port.name: TYPES[port.type] for port in self._session.get_inputs() if port.type in TYPES}
        self._past, self._dtype = list(types), next(iter(types.values()))
        self._present = [port.name for port in self._session.get_outputs() if port.name != LOGITS]

    def empty_cache(self, batch: int, room: int = 0) -> SharedCache:
        shapes = empty_past(self._manifest, batch)
        cache = SharedCache([np.zeros(shape, self._dtype) for shape in shapes.values()], np.zeros(batch, np.int64))
        cache.reserve(room)
        return cache

    def assemble(self, parts: Sequence[Part], room: int = 0) -> SharedCache:
        cache = self.empty_cache(len(parts), max(room, widest(parts)))
        for row, part in enumerate(parts):
            cache.lengths[row] = count = part.end - part.start
            for array, source in zip(cache.arrays, part.cache.arrays, strict=True):
                array[row, :, :count] = source[part.row, :, :count]
        return cache

    def step(self, feeds: Feeds, cache: SharedCache, *, last: bool = False) -> tuple[Logits, SharedCache]:
        batch, new = feeds.input_ids.shape
        real = feeds.attention_mask[:, -new:] != 0
        counts = real.sum(axis=1)
        past = feeds.attention_mask[:, :-new].astype(bool).sum(axis=1)
        if (past != cache.lengths).any() or (np.diff(real.astype(int), axis=1) < 0).any():
            raise BackendError(
                "the attention mask does not fit the cache",
                hint="New tokens are padded on the left, and the mask covers the past as it was fed.",
            )
        cache.reserve(int((past + counts).max()))
        if new == 1 and counts.all():
            logits = self._run(feeds.input_ids, feeds.position_ids, past, cache.arrays, 1)
        else:
            logits = np.zeros((batch, 1 if last else new, self.vocab_size), np.float32)
            for row, count in enumerate(counts):
                if count:
                    kept = 1 if last else count
                    ids, positions = (x[row : row + 1, new - count :] for x in (feeds.input_ids, feeds.position_ids))
                    views = [array[row : row + 1] for array in cache.arrays]
                    logits[row, -kept:] = self._run(ids, positions, past[row : row + 1], views, kept)
        return logits, SharedCache(cache.arrays, past + counts)

    def _run(self, ids: Ids, positions: Ids, past: Ids, arrays: list[NDArray[Any]], kept: int) -> Logits:
        """Rows of equally many new tokens [B, S], each after `past` [B] others, whose arrays are written."""
        totals = past + ids.shape[1]
        mask = (np.arange(totals.max()) < totals[:, None]).astype(np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, KEPT: np.array([kept])}
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._value(np.ascontiguousarray(array)))
        for past_name, present_name, array in zip(self._past, self._present, arrays, strict=True):
            shared = self._value(array)
            binding.bind_ortvalue_input(past_name, shared)
            binding.bind_ortvalue_output(present_name, shared)
        binding.bind_output(LOGITS)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as cause:
            raise failure("run", self._path, cause) from cause
        logits: Logits = binding.get_outputs()[-1].numpy().astype(np.float32, copy=False)
        return logits
