"""A bundle's IR in OpenVINO on the CPU. Keys and values lie in pages, as OpenVINO GenAI has them: one call takes any
rows, each with as many new tokens as it has.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Feeds, Ids, Logits, Piece, counts_of
from fope_export.bundle import Bundle
from fope_export.dtypes import BF16, DTYPES, FP32
from fope_export.errors import BackendError, cut, require
from fope_export.manifest import OPENVINO

WORDS = {1: np.uint8, 2: np.uint16, 4: np.float32}
"""NumPy's numbers with as many bytes as a cache's."""
SHORT = {FP32.precision: "f32", BF16.precision: BF16.name}
"""OpenVINO's names of what it computes in."""
ROUNDED_TOGETHER = 32
"""Inputs of a linear layer that share a scale where they are rounded."""
LONG = 32
"""New tokens of a row from which on products in bfloat16 are faster than those with inputs in 8 bits."""
KEPT = "kept"
"""An input, int64 [N]: the places among all new tokens whose logits are wanted."""


class Fed(NamedTuple):
    """New tokens of a row, after `past` others."""

    row: int
    ids: Ids  # [S]
    positions: Ids  # [S]
    past: int


class PagedSlots:
    """Rows of pages; each row's are one after the other, and there are more when a row needs them."""

    capacity: int | None = None

    def __init__(self, backend: "OpenVinoBackend", count: int, room: int, *, whole: bool = False) -> None:
        """With `whole` every row is computed by itself."""
        self.count, self.lengths, self._backend, self._whole = count, np.zeros(count, np.int64), backend, whole
        self._pages, self.tensors = 0, list[NDArray[Any]]()
        self._reserve(room)

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        logits = self.run([Fed(slot, ids, np.arange(start, start + len(ids)), start)], last=last)
        self.lengths[slot] = start + len(ids)
        return logits

    def prefill_together(self, pieces: Sequence[Piece]) -> Logits:
        fed = [Fed(slot, ids, np.arange(start, start + len(ids)), start) for slot, ids, start in pieces]
        logits = self._run(fed)
        for each in fed:
            self.lengths[each.row] = each.past + len(each.ids)
        return logits

    def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
        fed = [
            Fed(slot, np.array([token]), np.array([past]), past)
            for slot, token in zip(slots, tokens, strict=True)
            for past in [int(self.lengths[slot])]
        ]
        logits = self._run(fed)
        self.lengths[list(slots)] += 1
        return logits

    def _run(self, fed: Sequence[Fed]) -> Logits:
        """Logits [N, V] of each row's last token."""
        if self._whole:
            return np.concatenate([self.run([each], last=True) for each in fed])
        return self.run(fed, last=True)

    def run(self, fed: Sequence[Fed], *, last: bool) -> Logits:
        """Logits [N, V] of all new tokens, one row's after the other's, or of each row's last."""
        self._reserve(max(each.past + len(each.ids) for each in fed))
        return self._backend.run(self, fed, last=last)

    def pages(self, fed: Fed) -> range:
        """Those that hold a row's tokens."""
        first = fed.row * self._pages
        return range(first, first + -(-(fed.past + len(fed.ids)) // self._backend.page))

    def _reserve(self, tokens: int) -> None:
        """Make room for as many tokens in every row; what is there stays."""
        needed = -(-tokens // self._backend.page)
        if needed <= self._pages and self.tensors:
            return
        pages = max(needed, 2 * self._pages, 1)
        grown = self._backend.memory(self.count * pages)
        for old, new in zip(self.tensors, grown, strict=False):
            for row in range(self.count):
                new[row * pages :][: self._pages] = old[row * self._pages :][: self._pages]
        self._pages, self.tensors = pages, grown

    def copy(self, source: int, target: int, tokens: int) -> None:
        used = -(-tokens // self._backend.page)
        for tensor in self.tensors if source != target else ():
            tensor[target * self._pages :][:used] = tensor[source * self._pages :][:used]
        self.lengths[target] = tokens

    def free(self, slot: int) -> None:
        self.lengths[slot] = 0

    def close(self) -> None:
        self.tensors = self._backend.memory(0)
        self._backend.place(self.tensors)


class PagedCache(NamedTuple):
    """Slots, and how many tokens of each of their rows are this cache's."""

    slots: PagedSlots
    lengths: Ids  # [B]


class OpenVinoBackend:
    """The IR of `fope-export optimize --for openvino`. Rows are never padded."""

    name = "openvino"
    chunk = 2048  # each reads all pages before it, and those in 8 bits are unpacked for it

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, int8_activations: bool = False, cache: bool = False
    ) -> None:
        """`threads` compute one operator; 0 are as many as there are cores. With `int8_activations` linear layers whose
        weights are quantized round what they read, too, where the processor is faster so. With `cache` keys and values
        are rounded as the manifest says, each token's by itself. With both, LONG tokens and more of a row are computed
        in bfloat16 where the processor multiplies in it: what they leave in the cache is of the same form.

        Raises BackendError when OpenVINO is not there, or does not load the folder.
        """
        openvino = require("openvino", "openvino")
        self.vocab_size, self._path = bundle.manifest.decoder().vocab_size, bundle.path / OPENVINO
        settings: dict[str, str | int] = {
            **hints(bundle),
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": ROUNDED_TOGETHER if int8_activations else 0,
        }
        if cache and (row := bundle.manifest.cache_rounding):
            settings |= {"KV_CACHE_PRECISION": row.openvino, "KEY_CACHE_QUANT_MODE": "BY_TOKEN"}  # a cut page is right
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = openvino.Core().read_model(self._path)
            _page(model)
            self._short = self._long = Compiled(model, settings)
            if int8_activations and cache and _halves():
                self._long = Compiled(model, settings | {"INFERENCE_PRECISION_HINT": SHORT[BF16.precision]})
        except RuntimeError as cause:
            raise _failure("load", self._path, cause) from cause
        ports = self._short.caches.values()
        self._sizes = [
            ([size.get_length() for size in list(port.partial_shape)[1:]], WORDS[port.element_type.size])
            for port in ports
        ]
        """Of a page of each layer's keys and values: its shape, and its numbers."""
        self.page: int = self._sizes[0][0][1]

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> PagedSlots:
        return PagedSlots(self, count, room, whole=whole)

    def empty_cache(self, batch: int) -> PagedCache:
        return PagedCache(self.slots(batch), np.zeros(batch, np.int64))

    def step(self, feeds: Feeds, cache: PagedCache, *, last: bool = False) -> tuple[Logits, PagedCache]:
        batch, new = feeds.input_ids.shape
        counts, past = counts_of(feeds, cache.lengths)
        fed = [
            Fed(row, feeds.input_ids[row, -count:], feeds.position_ids[row, -count:], int(past[row]))
            for row, count in enumerate(counts.tolist())
            if count
        ]
        logits = np.zeros((batch, 1 if last else new, self.vocab_size), np.float32)
        if fed:
            rows = iter(cache.slots.run(fed, last=last))
            for each in fed:
                for place in range(-1 if last else -len(each.ids), 0):
                    logits[each.row, place] = next(rows)
        return logits, PagedCache(cache.slots, past + counts)

    def memory(self, pages: int) -> list[NDArray[Any]]:
        """Keys and values of every layer in as many pages of zeros."""
        return [np.zeros((pages, *shape), dtype) for shape, dtype in self._sizes]

    def run(self, slots: PagedSlots, fed: Sequence[Fed], *, last: bool) -> Logits:
        """Logits [N, V]. Raises BackendError with what OpenVINO says."""
        chosen = self._long if max(len(each.ids) for each in fed) >= LONG else self._short
        try:
            self.place(slots.tensors)
            logits = chosen.run(_inputs(slots, fed, last=last))
        except RuntimeError as cause:
            raise _failure("run", self._path, cause) from cause
        return logits.reshape(-1, self.vocab_size)

    def place(self, tensors: list[NDArray[Any]]) -> None:
        """Have the next call read and write this memory, and no longer hold what it did before."""
        for each in (self._short, self._long):
            each.place(tensors)

    def close(self) -> None:
        del self._short, self._long


class Compiled:
    """A graph whose cache lies in pages, compiled with some settings."""

    def __init__(self, model: Any, settings: dict[str, str | int]) -> None:
        openvino = require("openvino", "openvino")
        self._request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        self._tensor, self._shape = openvino.Tensor, openvino.Shape
        compiled = self._request.get_compiled_model()
        self._logits = compiled.output("logits")
        self.caches = {port.get_any_name(): port for port in compiled.inputs if "_cache." in port.get_any_name()}
        """Its inputs for keys and values by name."""
        self._placed: list[NDArray[Any]] = []
        self._given: dict[str, NDArray[Any]] = {}
        """The memory of other inputs, as they were last."""

    def place(self, tensors: list[NDArray[Any]]) -> None:
        """Have `run` read and write this memory, and no longer hold what it did before."""
        if self._placed is not tensors:
            for (name, port), array in zip(self.caches.items(), tensors, strict=True):
                self._request.set_tensor(name, self._tensor(array, self._shape(array.shape), port.element_type))
            self._placed = tensors

    def run(self, inputs: dict[str, NDArray[Any]]) -> Logits:
        """Its logits."""
        for name, array in inputs.items():
            if (given := self._given.get(name)) is not None and given.shape == array.shape:
                given[...] = array
            else:
                self._request.set_tensor(name, tensor := self._tensor(array))
                self._given[name] = tensor.data
        self._request.start_async()  # `infer` would make a dictionary of all outputs, which takes longer
        self._request.wait()
        logits: Logits = self._request.get_tensor(self._logits).data.astype(np.float32)
        return logits


def _page(model: Any) -> None:
    """Have a stateful model keep its cache in pages, by OpenVINO's own transformation, and compute logits of those
    tokens alone that the input KEPT names.
    """
    from openvino import opset13 as op
    from openvino._offline_transformations import paged_attention_transformation

    paged_attention_transformation(model)
    for node in model.get_ordered_ops():  # attention over nothing is 0 and not NaN; in pages nobody attends to nothing
        if node.get_type_name() == "Select" and node.input_value(0).get_node().get_type_name() == "IsNaN":
            node.output(0).replace(node.input_value(2))
    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    kept = op.parameter([-1], np.int64, name=KEPT)
    kept.output(0).set_names({KEPT})
    chosen = op.gather(head.input_value(0), kept, op.constant(np.int64(0)))
    head.input(0).replace_source_output(chosen.output(0))
    model.add_parameters([kept])
    model.validate_nodes_and_infer_types()


def _inputs(slots: PagedSlots, fed: Sequence[Fed], *, last: bool) -> dict[str, NDArray[Any]]:
    """What a call is given beside the pages: rows lie one after the other, and so do the numbers of their pages."""
    ends = [*accumulate((len(each.ids) for each in fed), initial=0)]
    pages = [slots.pages(each) for each in fed]
    return {
        "input_ids": np.concatenate([each.ids for each in fed], dtype=np.int64),
        "position_ids": np.concatenate([each.positions for each in fed], dtype=np.int64),
        "past_lens": np.array([each.past for each in fed], np.int32),
        "subsequence_begins": np.array(ends, np.int32),
        "block_indices": np.concatenate([np.arange(each.start, each.stop, dtype=np.int32) for each in pages]),
        "block_indices_begins": np.array([*accumulate(map(len, pages), initial=0)], np.int32),
        "max_context_len": np.array(max(each.past + len(each.ids) for each in fed), np.int32),
        KEPT: np.array(ends[1:]) - 1 if last else np.arange(ends[-1]),
    }


@cache
def _halves() -> bool:
    """Whether this processor multiplies in bfloat16."""
    openvino = require("openvino", "openvino")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def arithmetic(bundle: Bundle) -> str:
    """The dtype that a bundle is computed in here: its own where that is float32, or bfloat16 on a processor that
    multiplies in it, else float32. Raises BackendError without OpenVINO.
    """
    dtype = DTYPES[bundle.manifest.export.dtype]
    return dtype.precision if dtype.precision in SHORT and (dtype.widened is None or _halves()) else FP32.precision


def hints(bundle: Bundle) -> dict[str, str]:
    """OpenVINO's settings for that, cache included. Raises BackendError without OpenVINO."""
    precision = SHORT[arithmetic(bundle)]
    return {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}


def _failure(what: str, path: Path, cause: Exception) -> BackendError:
    version, reason = require("openvino", "openvino").__version__, " ".join(str(cause).split())
    return BackendError(
        f"OpenVINO {version} does not {what} {path}: {cut(reason)}",
        hint="Make it again with `fope-export optimize --for openvino`.",
    )
