"""Which backends there are, what this machine has, and the choice between them with every reason."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from fope_export.backends.base import Backend
from fope_export.bundle import Bundle
from fope_export.errors import BackendError

PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "polygraphy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)


@dataclass(frozen=True)
class Machine:
    """What was read once: everything decided from it can be decided again without the machine."""

    system: str
    python: str
    cores: int
    gpus: tuple[str, ...]
    packages: Mapping[str, str]
    """Installed versions by distribution name."""


@cache
def read_machine() -> Machine:
    """This machine, read once. Imports nothing heavy."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=_gpus(),
        packages={name: found for name in PACKAGES if (found := _installed(name))},
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[str, ...]:
    if not (tool := shutil.which("nvidia-smi")):
        return ()
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.split("\n")[:-1]) if done.returncode == 0 else ()


@dataclass(frozen=True)
class Row:
    """A backend: why a machine cannot run it (or nothing), and how a bundle becomes one."""

    what: str
    missing: Callable[[Machine], str]
    load: Callable[[Bundle], Backend]


def _load_ort(bundle: Bundle) -> Backend:
    from fope_export.backends.ort import OrtBackend

    return OrtBackend(bundle)


def _load_eager(bundle: Bundle) -> Backend:
    from fope_export.backends.eager import EagerBackend
    from fope_export.model.checkpoint import source_of

    return EagerBackend(source_of(bundle).model)


def _without_ort(machine: Machine) -> str:
    installed = {"onnxruntime", "onnxruntime-gpu"} & set(machine.packages)
    return "" if installed else "onnxruntime is not installed: pip install 'fope-export[cpu]'"


BACKENDS: dict[str, Row] = {
    "onnxruntime": Row("the bundle in ONNX Runtime on the CPU", _without_ort, _load_ort),
    "torch": Row("its checkpoint in PyTorch, eager", lambda machine: "", _load_eager),
}
"""In order of preference."""


def abilities(machine: Machine) -> dict[str, str]:
    """What a machine could do -> why it cannot, or nothing where it can."""
    missing = {"torch", "onnx", "onnxscript"} - set(machine.packages)
    runs = {name: row.missing(machine) for name, row in BACKENDS.items()}
    return {
        "export a checkpoint": f"{', '.join(sorted(missing))} not installed" if missing else "",
        **{f"run {BACKENDS[name].what}": reason for name, reason in runs.items()},
        "validate a bundle": runs["onnxruntime"],
        "use a GPU": f"{_found(machine.gpus)}; nothing in this version uses one",
    }


def _found(gpus: tuple[str, ...]) -> str:
    return f"found {', '.join(gpus)}" if gpus else "none found"


def choose(wanted: str | None, machine: Machine) -> str:
    """The backend `wanted`, or the best that `machine` can run.

    Raises BackendError with the reason against `wanted`, or against each.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise BackendError(f"there is no backend {wanted!r}", hint=f"One of: {', '.join(BACKENDS)}.")
    reasons = {name: row.missing(machine) for name, row in BACKENDS.items() if wanted in (None, name)}
    for name, reason in reasons.items():
        if not reason:
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendError(f"no backend can run: {told}", hint="fope-export doctor says what is missing.")


def load_backend(bundle: Bundle, wanted: str | None = None) -> Backend:
    """The chosen backend with `bundle` in it.

    Raises BackendError when it cannot run here, or does not load the bundle.
    """
    return BACKENDS[choose(wanted, read_machine())].load(bundle)
