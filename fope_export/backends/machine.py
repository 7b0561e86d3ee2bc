"""What a machine has, read once, so that everything decided from it can be decided again without the machine."""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from subprocess import TimeoutExpired

from fope_export.errors import BackendError
from fope_export.processes import output
from fope_export.tensorrt import compile

PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "matplotlib",
    "polygraphy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "optimum-onnx",
    "optimum-intel",
    "nncf",
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
    "llama-cpp-python",
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
    compiler: str = ""
    """What compiles the TensorRT plugin, with versions."""
    without_compiler: str = ""
    """Why nothing does."""
    architectures: tuple[str, ...] = ()
    """Of the GPUs, as sm90."""


@cache
def read_machine() -> Machine:
    """This machine, read once. Imports nothing heavy."""
    (compiler, without_compiler), gpus = _compiler(), _gpus()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=tuple(name for name, _ in gpus),
        architectures=tuple(f"sm{capability.replace('.', '')}" for _, capability in gpus),
        packages={name: installed for name in PACKAGES if (installed := _installed(name))},
        compiler=compiler,
        without_compiler=without_compiler,
    )


def _compiler() -> tuple[str, str]:
    try:
        tools = compile.find_toolchain()
    except BackendError as refusal:
        return "", str(refusal)
    if tools.headers_version is None:
        return "", "TensorRT's headers are missing: set TENSORRT_ROOT, or pip install --no-deps kernel-lens"
    return f"nvcc {tools.nvcc_version}, TensorRT headers {tools.headers_version}", ""


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[tuple[str, str], ...]:
    """Names and compute capabilities."""
    if not (tool := shutil.which("nvidia-smi")):
        return ()
    command = [tool, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = output(command, timeout=20)
    except (OSError, TimeoutExpired):
        return ()
    lines = done.stdout.split("\n")[:-1] if done.returncode == 0 else []
    return tuple((name.strip(), capability.strip()) for name, _, capability in (line.rpartition(",") for line in lines))
