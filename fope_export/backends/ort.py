"""ONNX Runtime on the CPU, through the names of the bundle's graph and nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fope_export.backends.base import CHUNK, Feeds, Limits, Logits, Slots, empty_past, inputs_of
from fope_export.backends.stacked import Part, StackedSlots, fill, widest
from fope_export.backends.versions import too_old
from fope_export.bundle import Bundle
from fope_export.dtypes import DTYPES
from fope_export.errors import BackendError, require
from fope_export.manifest import ROUNDED_CACHE, plain_file

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
TYPES = {f"tensor({row.element})": getattr(np, row.precision) for row in DTYPES.values() if not row.widened}
"""NumPy's, by ONNX Runtime's names: of the floating point numbers that it computes in."""


class OrtBackend:
    """A bundle's portable file in ONNX Runtime. Caches are OrtValues, handed from step to step without a copy; a static
    one is written in place.

    Where ONNX Runtime's CPU has no kernels for a dtype, that is the bundle's copy in a wider one (`plain_file`), on the
    same weights, which shows that the graph is right, and not what the dtype rounds.
    """

    chunk = CHUNK

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        """`threads` compute one operator; 0 are as many as there are cores.

        Raises BackendError when ONNX Runtime is not there, or does not load the file.
        """
        self.vocab_size = bundle.manifest.decoder().vocab_size
        self._ort = require("onnxruntime", "run")
        self.name, self._path, self._manifest = "onnxruntime", bundle.model, bundle.manifest
        self._session = session_of(bundle, threads=threads)
        self._present = [output.name for output in self._session.get_outputs()][1:]
        self._types = {port.name: TYPES[port.type] for port in self._session.get_inputs() if port.type in TYPES}

    def empty_cache(self, batch: int) -> list[Any]:
        shapes = empty_past(self._manifest, batch)
        return [self._value(np.zeros(shape, self._types[name])) for name, shape in shapes.items()]

    def assemble(self, parts: Sequence[Part]) -> list[Any]:
        width, static = widest(parts), self._manifest.export.capacity
        made = []
        for tensors in zip(*([value.numpy() for value in part.cache] for part in parts), strict=True):
            _, heads, _, channels = tensors[0].shape
            new = np.zeros((len(parts), heads, static or width, channels), tensors[0].dtype)
            made.append(self._value(fill(new, tensors, parts, width)))
        return made

    def step(self, feeds: Feeds, cache: list[Any], *, last: bool = False) -> tuple[Logits, list[Any]]:
        Limits(length=self._manifest.export.capacity).check(feeds)
        inputs = {name: self._value(array) for name, array in inputs_of(self._manifest, feeds).items()}
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
            raise failure("run", self._path, cause) from cause
        logits, *present = binding.get_outputs()
        # The static cache's own values, and not their aliases among the outputs: those do not keep its memory alive.
        wanted = logits.numpy()
        wanted = wanted[:, -1:].copy() if last else wanted  # a view would keep the others
        return wanted.astype(np.float32, copy=False), cache if static else present

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:  # noqa: ARG002
        return StackedSlots(self, count, self._manifest.export.capacity, whole=whole)

    def close(self) -> None:
        del self._session

    def _value(self, array: np.ndarray[Any, Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


class OrtGraph:
    """Any bundle's portable file in ONNX Runtime, as the graph is: named arrays in, its outputs in their order out."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BackendError when ONNX Runtime is not there, or does not load the file."""
        self._path, self._session = bundle.model, session_of(bundle)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Raises BackendError with what ONNX Runtime says."""
        try:
            return list(self._session.run(None, dict(inputs)))
        except Exception as cause:
            raise failure("run", self._path, cause) from cause


def session_of(
    bundle: Bundle,
    name: str = "",
    *,
    threads: int = 0,
    device: str = "cpu",
    spoken: bool = True,
    cuda_graph: bool = False,
) -> Any:
    """A session of the bundle's file `name`, or the portable one, on the cpu or on cuda; without `spoken` it keeps
    warnings to itself, with `cuda_graph` it captures the runs that name a graph.

    Raises BackendError when ONNX Runtime is not there, is too old, does not load the file, or finds no such device.
    """
    ort = require("onnxruntime", "run")
    cache = bundle.manifest.cache_rounding if name == ROUNDED_CACHE else None
    for row, hint in ((None, "export as `fope-export export`"), (cache, "optimize as `fope-export optimize`")):
        if reason := too_old("onnxruntime", ort.__version__, bundle.manifest.export, row):
            raise BackendError(reason, hint=f"Or {hint} does by default: older ones run that.")
    path = runnable(bundle, name)
    try:
        return open_session(path, threads=threads, device=device, spoken=spoken, cuda_graph=cuda_graph)
    except BackendError:
        raise
    except Exception as cause:  # ONNX Runtime's errors share no base class of their own
        raise failure("load", bundle.path / path.name, cause) from cause


def runnable(bundle: Bundle, name: str = "") -> Path:
    """The bundle's file `name`, or the portable one, as ONNX Runtime's CPU loads it.

    Raises BackendError where there is none.
    """
    plain = plain_file(bundle.manifest.export)
    if plain not in bundle.manifest.files:
        raise BackendError(
            f"{bundle.path} was exported by an earlier version, which wrote no {plain} for runtimes without "
            f"{bundle.manifest.export.dtype}",
            hint="Export the checkpoint again.",
        )
    return bundle.loadable(name or plain)


def open_session(
    path: Path | bytes,
    *,
    data: Path | None = None,
    threads: int = 0,
    device: str = "cpu",
    spoken: bool = True,
    cuda_graph: bool = False,
    prepacked: bool = True,
) -> Any:
    """A session of any file, as of a bundle's, or of a file's bytes, whose weights lie in folder `data`; it is faster
    where they are `prepacked` and widened beforehand, and has some of them three times for a while.

    Raises BackendError without the device, and what ONNX Runtime raises.
    """
    ort = require("onnxruntime", "run")
    _has(PROVIDERS[device][0], ort.get_available_providers())
    options = ort.SessionOptions()
    options.enable_mem_pattern = False  # it plans memory for every new shape, and every step has new shapes
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # kernels for int8 saturate on some processors
    if data:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data))
    if not prepacked:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = threads
    options.log_severity_level = -1 if spoken else 3
    graphs = {"enable_cuda_graph": "1"} if cuda_graph else {}
    settings = [graphs if name == PROVIDERS["cuda"][0] else {} for name in PROVIDERS[device]]
    left_out = [] if prepacked else ["ConstantFolding"]
    session = ort.InferenceSession(
        path, options, providers=PROVIDERS[device], provider_options=settings, disabled_optimizers=left_out
    )
    _has(PROVIDERS[device][0], session.get_providers())  # without an error it falls back to another
    return session


def _has(provider: str, available: Sequence[str]) -> None:
    if provider not in available:
        raise BackendError(
            f"ONNX Runtime has no {provider}, only {', '.join(available)}",
            hint="pip install onnxruntime-gpu in the place of onnxruntime; it says which CUDA it needs.",
        )


def failure(what: str, path: Path, cause: Exception) -> BackendError:
    """What ONNX Runtime said when it could not load or run a file."""
    version, reason = require("onnxruntime", "run").__version__, " ".join(str(cause).split())
    return BackendError(
        f"ONNX Runtime {version} does not {what} {path}: {reason}",
        hint="Export the checkpoint again; where it was exported just now, a newer ONNX Runtime may run it.",
    )
