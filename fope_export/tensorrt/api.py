"""One door to TensorRT: `tensorrt` and `tensorrt_rtx` have the same Python API and differ in how they are loaded."""

import ctypes
import importlib.util
import logging
import re
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from fope_export.errors import BackendError, install, require
from fope_export.scratch import KEPT

logger = logging.getLogger(__name__)
MESSAGES = 32
"""Complaints of TensorRT that an error may quote."""


@dataclass(frozen=True)
class Library:
    """A library that builds and runs engines. `distribution` is its name on PyPI, and a target's first part."""

    distribution: str
    module: str
    extra: str
    minimum: tuple[int, int]
    names_architectures: bool
    """Whether it builds for GPUs that are not there."""

    def refusal(self, packages: Mapping[str, str]) -> str:
        """Why the installed `packages` (versions by name) cannot do, or nothing."""
        given = packages.get(self.distribution)
        if given is None:
            return f"{self.distribution} is not installed: {install(self.extra)}"
        wanted = ".".join(map(str, self.minimum))
        return "" if version_of(given) >= self.minimum else f"{self.distribution} is {given}, and {wanted} is needed"


LIBRARIES = {
    row.distribution: row
    for row in (
        Library("tensorrt", "tensorrt", "gpu", (10, 13), names_architectures=False),
        Library("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx", (1, 7), names_architectures=True),
    )
}


def version_of(text: str) -> tuple[int, ...]:
    """(10, 13) of "10.13.3.9.post1"."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


@cache
def load(distribution: str) -> ModuleType:
    """The Python module of a library, ready to parse, build and run.

    Raises BackendError where it is missing, too old, broken, or a placeholder without content.
    """
    library = LIBRARIES[distribution]
    if library.module == "tensorrt_rtx":
        _preload_rtx(library)
    module = require(library.module, library.extra)
    if not hasattr(module, "OnnxParser"):
        raise BackendError(
            f"{library.module} at {module.__file__} is a placeholder: it has no OnnxParser",
            hint="Install TensorRT from NVIDIA's package index.",
        )
    if refusal := library.refusal({distribution: module.__version__}):
        raise BackendError(refusal, hint=install(library.extra, upgrade=True))
    return module


def _preload_rtx(library: Library) -> None:
    """Load TensorRT-RTX's libraries by the names they look for each other by.

    Its ONNX parser opens "libtensorrt_rtx.so" beside itself, and the wheel has "libtensorrt_rtx.so.1" alone: without a
    folder that has both names, parsing with a plugin ends the process.
    """
    package = importlib.util.find_spec(f"{library.module}_libs")
    if package is None or not package.submodule_search_locations:
        return  # require() says what is missing
    if f"{library.module}_bindings" in sys.modules:
        raise BackendError(
            f"{library.module} was imported before fope_export could prepare its libraries",
            hint="Import fope_export.tensorrt.api first, and load the library through it.",
        )
    names = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
    folder = KEPT.folder()
    for name in names:
        for link in (name, name.removesuffix(".1")):
            (folder / link).symlink_to(Path(package.submodule_search_locations[0]) / name)
    try:
        for name in names:
            ctypes.CDLL(str(folder / name))
    except OSError as cause:
        raise BackendError(
            f"{library.module} is installed but its libraries do not load: {cause}", hint=f"Reinstall {library.module}."
        ) from cause


def make_log(trt: ModuleType) -> Any:
    """A logger that hands messages on to `logging`, for debugging, and keeps the MESSAGES last different ones of those
    that say what went wrong: `errors()` joins them.
    """
    severe = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._kept: deque[str] = deque(maxlen=MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            logger.debug("%s: %s", trt.__name__, message)
            if severity in severe and message not in self._kept:
                self._kept.append(message)

        def errors(self) -> str:
            # Where there is no driver, each complaint is followed by one about that.
            return "; ".join([message for message in self._kept if "CUDA driver" not in message] or self._kept)

    return Log()


def load_plugin(trt: ModuleType, path: Path, log: Any, *, name: str, versions: Iterable[str], namespace: str) -> None:
    """Register the plugin library at `path`.

    Raises BackendError when it does not load, or does not bring a creator for each of the versions.
    """
    registry = trt.get_plugin_registry()
    if not registry.load_library(str(path)):
        raise BackendError(
            f"{trt.__name__} {trt.__version__} does not load the plugin library {path}: {log.errors()}",
            hint="Remove the file, so that it is compiled again, or build with --no-plugin.",
        )
    for wanted in versions:
        if registry.get_creator(name, wanted, namespace) is None:
            raise BackendError(
                f"{path} was loaded and has no creator {namespace}::{name} of version {wanted}",
                hint="It is not this program's plugin, or of another version: remove it, so that it is compiled again.",
            )


def check_installed(distribution: str) -> None:
    """Raises BackendError unless a library is installed and new enough. Does not load it."""
    library = LIBRARIES[distribution]
    if refusal := library.refusal(_installed(distribution)):
        raise BackendError(refusal, hint=install(library.extra, upgrade=True))


def installed_version(distribution: str) -> tuple[int, ...]:
    """(major, minor) of an installed library."""
    return version_of(_installed(distribution)[distribution])


def _installed(distribution: str) -> dict[str, str]:
    try:
        return {distribution: version(distribution)}
    except PackageNotFoundError:
        return {}
