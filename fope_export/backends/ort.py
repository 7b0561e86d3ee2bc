"""ONNX Runtime on the CPU, through the names of the bundle's graph and nothing else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fope_export.backends.base import Feeds, Limits, Logits, empty_past
from fope_export.bundle import MODEL, Bundle
from fope_export.errors import BackendError, require

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OrtBackend:
    """A bundle's model.onnx in ONNX Runtime. Caches are OrtValues, handed from step to step without a copy; a static
    one is written in place.

    ONNX Runtime's CPU has no kernels for bfloat16: such a bundle runs as a copy with the same weights in float32, which
    shows that the graph is right, and not what bfloat16 rounds.
    """

    def __init__(self, bundle: Bundle, *, exact: bool = False) -> None:
        """`exact` takes the rounding of inputs out of a calibrated bundle.

        Raises BackendError when ONNX Runtime is not there, or does not load the file.
        """
        self.vocab_size = bundle.manifest.decoder().vocab_size
        self._ort = require("onnxruntime", "cpu")
        self.name, self._path, self._manifest = "onnxruntime", bundle.model, bundle.manifest
        self._session = _session(bundle, exact=exact)
        self._present = [output.name for output in self._session.get_outputs()][1:]
        self._types = {port.name: TYPES[port.type] for port in self._session.get_inputs() if port.type in TYPES}

    def empty_cache(self, batch: int) -> list[Any]:
        shapes = empty_past(self._manifest, batch)
        return [self._value(np.zeros(shape, self._types[name])) for name, shape in shapes.items()]

    def step(self, feeds: Feeds, cache: list[Any]) -> tuple[Logits, list[Any]]:
        Limits(length=self._manifest.export.capacity).check(feeds)
        inputs = {name: self._value(array) for name, array in feeds._asdict().items()}
        inputs |= dict(zip(self._types, cache, strict=True))
        binding, static = self._session.io_binding(), self._manifest.export.cache == "static"
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name, value in zip(self._present, cache, strict=True):
            if static:
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as cause:
            raise _error("run", self._path, cause) from cause
        logits, *present = binding.get_outputs()
        # The static cache's own values, and not their aliases among the outputs: those do not keep its memory alive.
        return logits.numpy().astype(np.float32, copy=False), cache if static else present

    def _value(self, array: np.ndarray[Any, Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


class OrtGraph:
    """Any bundle's model.onnx in ONNX Runtime, as the graph is: named arrays in, its outputs in their order out."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BackendError when ONNX Runtime is not there, or does not load the file."""
        self._path, self._session = bundle.model, _session(bundle)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Raises BackendError with what ONNX Runtime says."""
        try:
            return list(self._session.run(None, dict(inputs)))
        except Exception as cause:
            raise _error("run", self._path, cause) from cause


def _session(bundle: Bundle, *, exact: bool = False) -> Any:
    try:
        with runnable(bundle, exact=exact) as path:
            return session_of(path)
    except BackendError:
        raise
    except Exception as cause:  # ONNX Runtime's errors share no base class of their own
        raise _error("load", bundle.model, cause) from cause


def session_of(path: Path) -> Any:
    """A session on the CPU, with every bundle's settings. Raises what ONNX Runtime raises."""
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.enable_mem_pattern = False  # it plans memory for every new shape, and every step has new shapes
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # kernels for int8 saturate on some processors
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _error(what: str, path: Path, cause: Exception) -> BackendError:
    reason = " ".join(str(cause).split())
    return BackendError(f"ONNX Runtime does not {what} {path}: {reason}", hint="Export the checkpoint again.")


@contextmanager
def runnable(bundle: Bundle, *, exact: bool = False) -> Iterator[Path]:
    """The bundle's model, the float32 copy of a bfloat16 one, or one with exact inputs, while a session loads it."""
    wide = bundle.manifest.export.dtype == "bf16"
    if not (wide or exact):
        yield bundle.model
        return
    from fope_export.graph.passes import Widen, rewritten
    from fope_export.graph.qdq import ExactInputs

    edits = [*([Widen()] if wide else []), *([ExactInputs()] if exact else [])]
    with TemporaryDirectory(prefix="fope-export-") as folder:
        yield rewritten(bundle.model, Path(folder) / MODEL, edits)
