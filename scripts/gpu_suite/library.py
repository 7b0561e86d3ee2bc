"""Compiles the kernel, what is timed beside it and what is sanitized, and calls the kernel on torch's tensors."""

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fope_export.errors import BackendError
from fope_export.tensorrt import compile as compiling
from gpu_suite.cases import KINDS, Call, Launch

HERE = Path(__file__).parent
HEADER = (compiling.SOURCES / "arguments.h").read_text()
CTYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float}
FAULTS = {int(code): name for name, code in re.findall(r"(FOPE_ROTARY_\w+) = (-\d+)", HEADER)}
FLAGS = ("-O3", "-std=c++17", "--cudart", "static", f"-I{compiling.SOURCES}")
LIBRARY = ("-shared", "-Xcompiler", "-fPIC")


def fields(header: str, name: str) -> list[tuple[str, Any]]:
    """Names and C types of the members of a struct, as arguments.h declares them; without those that it inherits."""
    body = re.search(rf"struct {name}(?: : \w+)? \{{(.*?)\n\}};", header, re.DOTALL)
    if body is None:
        raise BackendError(f"arguments.h declares no {name}", hint="Bring library.py up to date with it.")
    members = re.findall(r"^\s*([^/\n]*?)\s*(\w+);", body.group(1), re.MULTILINE)
    return [(name, ctypes.c_void_p if "*" in kind else CTYPES[kind]) for kind, name in members]


class Arguments(ctypes.Structure):
    """FopeRotaryArguments of arguments.h."""

    _fields_ = tuple(fields(HEADER, "FopeRotaryArguments"))


class GeneralArguments(Arguments):
    """FopeRotaryGeneralArguments of arguments.h."""

    _fields_ = tuple(fields(HEADER, "FopeRotaryGeneralArguments"))


def arguments(call: Call, q_rotated: Tensor, k_rotated: Tensor) -> Arguments:
    case, shape = call.case, call.case.shape
    names = "q k position_ids freq sin_coef cos_coef".split()
    tensors = {name: getattr(call, name) for name in names} | {"q_rotated": q_rotated, "k_rotated": k_rotated}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    values = {name: tensor.data_ptr() for name, tensor in tensors.items()} | {
        "tokens": shape.B * shape.S, "heads": shape.H, "kv_heads": shape.K, "head_dim": shape.E,
        "rotary_dim": case.rotary,
        "frequencies": shape.D, "pairs": shape.F, "groups": shape.G, "interleaved": case.interleaved,
        "dtype": KINDS[case.kind].onnx, "sin_pad": case.sin_pad, "cos_pad": case.cos_pad, "sign": case.sign,
    }  # fmt: skip
    if case.general:
        axis = torch.zeros_like(call.freq, dtype=torch.int64) if call.axis is None else call.axis
        more = {
            "positions": call.position_ids.data_ptr(), "axis": axis.data_ptr(), "rows": call.sin_coef.shape[1],
            "position_type": 7 if case.whole else 1,
        }  # fmt: skip
        made = GeneralArguments(**values | more)
        made.kept = axis  # its memory lives as long as the arguments
        return made
    declared = {field[0] for field in Arguments._fields_}
    if declared != values.keys():
        raise BackendError(
            f"arguments.h differs from the suite in {', '.join(sorted(declared ^ values.keys()))}",
            hint="Bring arguments() in library.py up to date with it.",
        )
    return Arguments(**values)


def succeed(code: int, what: str) -> None:
    """Raises RuntimeError for a cudaError_t or a FopeRotaryFault."""
    if code:
        raise RuntimeError(f"{what} returned {code} ({FAULTS.get(code, 'a cudaError_t')})")


def stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


@dataclass(frozen=True)
class Compiled:
    """What was compiled. `planned` is None, and `planned_fault` says why, where the kernel's insides have changed."""

    toolchain: compiling.Toolchain
    kernel: Path
    empty: Path
    sanitized: Path
    planned: Path | None
    planned_fault: str

    def launch(self) -> Launch:
        library = ctypes.CDLL(str(self.kernel))

        def launch(call: Call, q_rotated: Tensor, k_rotated: Tensor) -> None:
            function = library.fope_rotary_launch_general if call.case.general else library.fope_rotary_launch
            succeed(function(ctypes.byref(arguments(call, q_rotated, k_rotated)), stream()), function.__name__)

        return launch

    def with_plan(self, tile: int, vector: int, threads: int) -> Launch:
        function = ctypes.CDLL(str(self.planned)).suite_planned

        def launch(call: Call, q_rotated: Tensor, k_rotated: Tensor) -> None:
            given = ctypes.byref(arguments(call, q_rotated, k_rotated))
            succeed(function(given, tile, vector, threads, stream()), "suite_planned")

        return launch

    def nothing(self) -> Callable[[], None]:
        function = ctypes.CDLL(str(self.empty)).suite_empty
        return lambda: succeed(function(stream()), "suite_empty")


def compile_own(
    toolchain: compiling.Toolchain, source: str, architecture: str, output: Path, flags: tuple[str, ...]
) -> Path:
    """Compile a source of this folder. Raises BackendError with the compiler's last words."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command: list[str | Path] = [toolchain.nvcc, HERE / source, *FLAGS, *flags, code, "-ccbin", toolchain.cxx]
    done = subprocess.run([*command, "-o", output], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"nvcc does not compile {source}: {done.stderr[-1500:]}", hint="Has the kernel changed?")
    return output


def compile_all(architecture: str, folder: Path) -> Compiled:
    """Compile for one compute capability ("90") into an empty folder.

    Raises BackendError where a compiler is missing or refuses.
    """
    toolchain = compiling.find_toolchain()
    own = functools.partial(compile_own, toolchain, architecture=architecture)
    with ThreadPoolExecutor() as pool:
        planned = pool.submit(_if_possible, lambda: own("planned.cu", output=folder / "planned.so", flags=LIBRARY))
        sanitized = pool.submit(own, "sanitize.cu", output=folder / "sanitized", flags=("-lineinfo",))
        empty = pool.submit(own, "empty.cu", output=folder / "empty.so", flags=LIBRARY)
        kernel = compiling.build(compiling.KERNEL, toolchain, (architecture,), cache=folder)
    return Compiled(toolchain, kernel, empty.result(), sanitized.result(), *planned.result())


def _if_possible(job: Callable[[], Path]) -> tuple[Path | None, str]:
    try:
        return job(), ""
    except BackendError as error:
        return None, str(error)


def compile_host(toolchain: compiling.Toolchain, folder: Path) -> Launch:
    """The kernel's code on the CPU, for the dry run."""
    library = ctypes.CDLL(str(compiling.build(compiling.HOST, toolchain, cache=folder)))

    def launch(call: Call, q_rotated: Tensor, k_rotated: Tensor) -> None:
        function = library.fope_rotary_host_general if call.case.general else library.fope_rotary_host
        succeed(function(ctypes.byref(arguments(call, q_rotated, k_rotated)), 0, 0, 0), function.__name__)

    return launch
