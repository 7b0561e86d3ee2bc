"""Proves and times the CUDA kernel on the GPU at hand. Run it with scripts/gpu_suite.sh.

cases       inputs, the definition in float64, and the check: poison, fences, ulps
library     compiles the kernel and calls it
rivals      the same rotation in torch, and a fused RoPE in Triton
benchmarks  what is timed, beside what, and how many bytes it moves
stopwatch   how a launch is timed
sanitizer   compute-sanitizer around a program without torch
report      what was found, as plain text
engine      a TensorRT-RTX plan on the card

Needs torch and nvcc; of fope_export only the modules that need the standard library alone.
"""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

try:
    import fope_export  # noqa: F401
except PackageNotFoundError:  # a checkout that was never installed: its modules, without what its __init__ does
    sys.modules["fope_export"] = ModuleType("fope_export")
    sys.modules["fope_export"].__path__ = [str(Path(__file__).parents[2] / "fope_export")]
