"""Keys and values rounded in the optimized file's cache: each channel of each head in steps of its own, which are fixed
and fit what sample text needs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.bundle import Bundle
from fope_export.dtypes import BF16, FP32
from fope_export.errors import BackendError, ConfigError, cut, require
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.calibration import calibration_windows
from fope_export.graph.fusion import ATTENTION
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import array_of
from fope_export.manifest import plain_file
from fope_export.quantizations import CacheRounding

PASTS, STEPS = slice(3, 5), slice(12, 14)
"""Inputs of attention: the caches of keys and values, and the steps in which they are rounded."""
BY_CHANNEL = "PER_CHANNEL"

Largest = Mapping[str, NDArray[np.float32]]
"""The largest absolute values of each channel of each head [K, E], by the name of the cache that holds them."""


class RoundCaches(Pass):
    """Attention writes its keys and values as integers, and reads them so."""

    def __init__(self, row: CacheRounding, largest: Largest) -> None:
        super().__init__()
        self._row, self._largest = row, largest

    def requires(self, model: ir.Model) -> None:
        wanted = {cache for node in _attentions(model) for cache in _caches(node)}
        if not wanted or wanted != self._largest.keys():
            differ = sorted(wanted ^ self._largest.keys()) or ["none"]
            raise PreconditionError(f"the caches of the graph and those that were measured disagree in {differ[0]}")

    def call(self, model: ir.Model) -> PassResult:
        builder, integers = GraphBuilder(model), ir.TensorType(ir.DataType[self._row.element])
        for node in _attentions(model):
            node.resize_inputs(STEPS.stop)
            for port, cache in zip(range(STEPS.start, STEPS.stop), _caches(node), strict=True):
                steps = steps_of(self._row, self._largest[cache])[None, :, None]
                node.replace_input_with(port, builder.constant(f"{cache}.steps", steps))
            for value in (*node.inputs[PASTS], *node.outputs[1:]):
                assert value is not None
                value.type = integers
            said: dict[str, str | int] = {
                "k_quant_type": BY_CHANNEL,
                "v_quant_type": BY_CHANNEL,
                "kv_cache_bit_width": self._row.bits,
            }
            node.attributes.update({name: ir.convenience.convert_attribute(name, x) for name, x in said.items()})
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for node in _attentions(model):
            if len(node.inputs) < STEPS.stop or BY_CHANNEL not in {x.value for x in node.attributes.values()}:
                raise PostconditionError(f"{node.name} does not round its cache")


def _attentions(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == ATTENTION)


def _caches(node: ir.Node) -> list[str]:
    return [value.name for value in node.inputs[PASTS] if value is not None and value.name]


def steps_of(row: CacheRounding, largest: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The steps in which nothing of what was measured is cut; one for a channel that is nothing but zeros."""
    return (np.where(largest > 0, largest, row.largest) / row.largest).astype(np.float32)


def steps_in(path: Path) -> dict[str, NDArray[np.float32]]:
    """The steps [K, E] that an optimized file has, by the name of their cache."""
    return {
        cache: array_of(steps)[0, :, 0]
        for node in _attentions(load_onnx(path))
        for cache, steps in zip(_caches(node), node.inputs[STEPS], strict=False)
    }


def calibrated_on(bundle: Bundle, file: Path | None) -> NDArray[np.int64]:
    """Token ids [N, S] to measure keys and values on: of `file`, or of Python's standard library.

    Raises ConfigError where there are none, or where the bundle's keys and values cannot be rounded.
    """
    export, config = bundle.manifest.export, bundle.manifest.decoder()
    for reason in (
        f"computes in {export.dtype}" if export.dtype not in (FP32.name, BF16.name) else "",
        "rounds inputs of layers in calibrated steps" if export.calibrated else "",
        "takes positions on several axes" if export.position_axes else "",
    ):
        if reason:
            raise ConfigError(
                f"{bundle.path} {reason}, and caches are rounded beside {FP32.precision} alone",
                hint="Leave --cache out, or export the checkpoint to another folder without that option.",
            )
    return calibration_windows(bundle.path, file, config.vocab_size, config.training_length)


def measure(bundle: Bundle, windows: NDArray[np.int64]) -> Largest:
    """What the portable file puts into its caches in some windows [N, S]. Raises BackendError where ONNX Runtime does
    not run it.
    """
    ort, export = require("onnxruntime", "run"), bundle.manifest.export
    path, config = bundle.loadable(plain_file(export)), bundle.manifest.decoder()
    length, found = windows.shape[1], dict[str, NDArray[np.float32]]()
    feeds = {"attention_mask": np.ones((1, length), np.int64), "position_ids": np.arange(length)[None]}
    empty = np.zeros((1, config.num_kv_heads, 0, config.spectrum.head_dim), np.float32)
    try:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        pasts = [port.name for port in session.get_inputs() if port.name not in {"input_ids", *feeds}]
        presents = [port.name for port in session.get_outputs()][1:]
        for ids in windows:
            inputs = {"input_ids": ids[None], **feeds, **dict.fromkeys(pasts, empty)}
            for name, present in zip(pasts, session.run(presents, inputs), strict=True):
                found[name] = np.maximum(abs(present).max(axis=(0, 2)), found.get(name, 0))
    except Exception as cause:  # ONNX Runtime's errors share no base class of their own
        raise BackendError(f"ONNX Runtime does not run {path}: {cut(cause)}", hint="Export it again.") from cause
    return found
