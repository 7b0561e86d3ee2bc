"""The compiled libraries, made once and kept in pytest's cache: their names tell what they were made of."""

import ctypes
import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from fope_export.tensorrt import compile as compiling

WARNINGS = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
Build = Callable[..., Path]


@pytest.fixture(scope="session")
def headers(toolchain: compiling.Toolchain) -> Path:
    """TensorRT's headers."""
    if toolchain.headers is None:
        pytest.skip("TensorRT's headers are missing: set TENSORRT_ROOT, or pip install --no-deps kernel-lens==2.0.1")
    return toolchain.headers


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("fope-export")


@pytest.fixture(scope="session")
def build(toolchain: compiling.Toolchain, cache: Path) -> Build:
    """`compile.build`, one at a time: what a worker compiles, the others find."""

    def build(target: compiling.Target, flags: tuple[str, ...]) -> Path:
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return compiling.build(target, toolchain, cache=cache, flags=flags)

    return build


@pytest.fixture(scope="session")
def host(build: Build) -> ctypes.CDLL:
    """The kernel's code, compiled for the CPU."""
    return ctypes.CDLL(str(build(compiling.HOST, flags=("-Wall", "-Wextra", "-Werror"))))


@pytest.fixture(scope="session")
def plugin(build: Build, headers: Path) -> Path:
    """The plugin for every architecture, compiled without a warning."""
    return build(compiling.PLUGIN, flags=WARNINGS)
