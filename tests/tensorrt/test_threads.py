"""The kernel's threads as real threads, all at once, under ThreadSanitizer, with the barriers that the GPU has."""

import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from fope_export.errors import BackendError
from fope_export.tensorrt import compile as compiling
from tests.tensorrt.conftest import Build
from tests.tensorrt.kernel import KINDS, SHAPES, mutated


class Launch(NamedTuple):
    """A plan and a shape for threads.cpp: tokens, pairs and threads as in `plans`, each block a thread of its own for
    each of them, so that there may be a few thousand in all.
    """

    shape: str
    kind: str
    interleaved: bool = False
    tile: int = 4
    vector: int = 1
    threads: int = 32
    axes: int = 0

    def numbers(self) -> list[str]:
        B, S, H, K, E, D, F, G = SHAPES[self.shape]  # noqa: N806 (the contract's letters)
        plan = (self.tile, self.vector, self.threads, KINDS[self.kind].onnx)
        return [str(n) for n in (*plan, B * S, H, K, E, E, D, F, G, int(self.interleaved), self.axes)]


LAUNCHES = {
    "gqa": Launch("gqa", "fp32"),
    "single tokens": Launch("mha", "bf16", tile=1),
    "a warp and more": Launch("two-key-heads-a-group", "fp32", interleaved=True, vector=4, threads=96),
    "shared coefficients": Launch("shared", "fp16", tile=8, vector=8, threads=64),
    "one pair": Launch("one-pair", "fp32"),
    "several axes and both bases": Launch("gqa", "fp16", axes=3),
    "many groups": Launch("many-groups", "fp16", tile=8),
    "blocks of one token and group": Launch("gqa", "fp16", tile=0),
}
MET = 66
"""The exit code of ThreadSanitizer where two threads met in one place without a barrier between them."""


def meet(program: Path, launch: Launch) -> subprocess.CompletedProcess[str]:
    """Run real threads; with fixed addresses where ThreadSanitizer does not know the ones that the system draws."""
    command, fixed = [str(program), *launch.numbers()], ["setarch", platform.machine(), "-R"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        done = subprocess.run([*fixed, *command], capture_output=True, text=True, timeout=120)
    return done


@pytest.fixture(scope="session")
def threads(build: Build) -> Path:
    """threads.cpp, compiled without a warning."""
    try:
        return build(compiling.THREADS, flags=("-Wall", "-Wextra", "-Werror"))
    except BackendError as refusal:
        if "tsan" in str(refusal):
            pytest.skip("the compiler has no ThreadSanitizer: install libtsan")
        raise


@pytest.mark.parametrize("launch", LAUNCHES)
def test_real_threads_never_meet(threads: Path, launch: str) -> None:
    done = meet(threads, LAUNCHES[launch])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


RACES = {
    "no barrier before the table": ("fill_basis(thread, threads);\n        barrier();", "fill_basis(thread, threads);"),
    "no barrier before rotation": (
        "fill_table(thread, threads, early);\n        barrier();",
        "fill_table(thread, threads, early);",
    ),
    "two threads fill one place": ("i < a.frequencies * Tile; i += threads", "i < a.frequencies * Tile; i += 1"),
    "two blocks write one head": ("first_group(y * of.chunk)", "first_group(0)"),
}


@pytest.mark.whole
@pytest.mark.parametrize("race", RACES)
def test_threads_that_meet_are_noticed(
    threads: Path, toolchain: compiling.Toolchain, tmp_path: Path, race: str
) -> None:
    sources = mutated(tmp_path, *RACES[race])
    built = compiling.build(compiling.THREADS, toolchain, cache=tmp_path, flags=("-O1",), sources=sources)  # no -O0:
    # g++ then writes what a function returns unseen
    done = meet(built, LAUNCHES["blocks of one token and group" if "blocks" in race else "gqa"])
    assert done.returncode == MET and "data race" in done.stderr
