"""Whether installed packages load: each in a process of its own, which they may end.

`python -m fope_export.backends.loading NAME` loads one of MODULES, and ends with 1 and the reason on stdout where that
does not go.
"""

import importlib
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from signal import Signals
from subprocess import TimeoutExpired

from fope_export.backends.machine import Machine
from fope_export.errors import cut
from fope_export.processes import output, python
from fope_export.tensorrt.api import LIBRARIES, load

MODULES = {
    "torch": "torch",
    "onnx": "onnx",
    "onnx-ir": "onnx_ir",
    "onnxscript": "onnxscript",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "polygraphy": "polygraphy.comparator",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "openvino": "openvino",
    **{name: library.module for name, library in LIBRARIES.items()},
}
"""What is loaded of a distribution; the doctor's answers rest on these."""
LIMIT = 120.0
"""Seconds that one may take."""


def tried(machine: Machine) -> Machine:
    """The machine with what of its packages does not load, and why."""
    names = [name for name in MODULES if name in machine.packages]
    with ThreadPoolExecutor(machine.cores) as pool:
        reasons: Mapping[str, str] = dict(zip(names, pool.map(_reason, names), strict=True))
    return replace(machine, broken={name: reason for name, reason in reasons.items() if reason})


def _reason(name: str) -> str:
    """Why a package does not load, or nothing."""
    try:
        done = output([*python(__spec__.name), name], timeout=LIMIT)
    except TimeoutExpired:
        return f"it takes more than {LIMIT:.0f} s"
    if done.returncode < 0:
        return f"it ends its process by {Signals(-done.returncode).name}"
    return cut(" ".join(done.stdout.split()[-50:]) or f"exit code {done.returncode}") if done.returncode else ""


def main(name: str) -> int:
    """Load one. Returns the exit code."""
    try:
        load(name) if name in LIBRARIES else importlib.import_module(MODULES[name])
    except Exception as cause:
        print(f"{type(cause).__name__}: {cause}")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
