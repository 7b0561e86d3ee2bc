"""ONNX Runtime on the CPU, through the names of the bundle's graph and nothing else."""

from typing import Any

import numpy as np

from fope_export.backends.base import Feeds, Logits
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, require

PAST = "past_key_values."


class OrtBackend:
    """A bundle's model.onnx in ONNX Runtime. Caches are OrtValues, handed from step to step without a copy."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BackendError when ONNX Runtime is not there, or does not load the file."""
        self._ort = require("onnxruntime", "cpu")
        self.name, self._path = "onnxruntime", bundle.model
        try:
            self._session = self._ort.InferenceSession(self._path, providers=["CPUExecutionProvider"])
        except Exception as cause:  # ONNX Runtime's errors share no base class of their own
            raise self._error("load", cause) from cause
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
        try:
            logits, *present = self._session.run_with_ort_values(self._outputs, inputs)
        except Exception as cause:
            raise self._error("run", cause) from cause
        return logits.numpy(), present

    def _error(self, what: str, cause: Exception) -> BackendError:
        reason = " ".join(str(cause).split())
        return BackendError(f"ONNX Runtime does not {what} {self._path}: {reason}", hint="Export the checkpoint again.")

    def _value(self, array: np.ndarray[Any, Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
