"""ONNX Runtime on the CPU, through the names of the bundle's graph and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np

from fope_export.backends.base import Feeds, Logits
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, require

PAST = "past_key_values."


class OrtBackend:
    """A bundle's model.onnx in ONNX Runtime. Caches are OrtValues, handed from step to step without a copy."""

    def __init__(self, bundle: Bundle, *, model: Path | None = None, threads: int = 0) -> None:
        """`model` is another file with the same inputs, in place of the bundle's; `threads` 0 means all cores.

        Raises BackendError when the file does not load.
        """
        self._ort = require("onnxruntime", "cpu")
        self.name = "onnxruntime"
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        path = model or bundle.model
        try:
            self._session = self._ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as cause:  # ONNX Runtime's errors share no base class of their own
            raise BackendError(
                f"ONNX Runtime does not load {path}: {cause}", hint="Export the checkpoint again."
            ) from cause
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past = [port.name for port in self._session.get_inputs() if port.name.startswith(PAST)]
        config = bundle.manifest.model
        self.vocab_size = config.vocab_size
        self._empty = (config.num_kv_heads, 0, config.spectrum.head_dim)

    def empty_cache(self, batch: int) -> list[Any]:
        return [self._value(np.zeros((batch, *self._empty), np.float32)) for _ in self._past]

    def step(self, feeds: Feeds, cache: list[Any]) -> tuple[Logits, list[Any]]:
        inputs = {name: self._value(array) for name, array in feeds._asdict().items()}
        inputs |= dict(zip(self._past, cache, strict=True))
        logits, *present = self._session.run_with_ort_values(self._outputs, inputs)
        return logits.numpy(), present

    def _value(self, array: np.ndarray[Any, Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
