"""The extra `run` alone, in the environment of `scripts/venv runtime` that FOPE_EXPORT_RUNTIME names: bundles run, what
is missing is named, and it is small.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.deploy import TARGETS
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize

FOLDER = os.environ.get("FOPE_EXPORT_RUNTIME")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs scripts/venv runtime")
RUNTIME = Path(FOLDER or "").resolve()
ABSENT = {"torch", "onnx", "onnx-ir", "onnxscript", "sympy", "safetensors", "matplotlib", "polygraphy"}
SIZE, OWN = 260, 110
"""MB that all may take, with pip and 15 of models that come along, and what is beyond NumPy and ONNX Runtime."""
PROGRAM = """
import sys
from fope_export.cli import main
code = main(sys.argv[1:])
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""
INSTALLED = "import importlib.metadata as m, json; print(json.dumps([each.name for each in m.distributions()]))"


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Away from this checkout, which would be imported."""
    return subprocess.run([RUNTIME / "bin/python", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("optimized", [False, True], ids=["portable", "optimized"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_bundle_writes_what_it_writes_here(
    dtype: str, optimized: bool, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = export(native, tmp_path / "out", ExportConfig(dtype=dtype))
    if optimized:
        optimize(made)
    command = ["run", str(made.path), "--prompt", "def main(", "--max-new-tokens", "8", "--json"]
    assert main(command) == 0
    done = python(tmp_path, "-c", PROGRAM, *command)
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(capsys.readouterr().out)
    loaded = {name.replace("_", "-") for name in done.stderr.split()}
    assert "onnxruntime" in loaded and not ABSENT & loaded


def test_what_needs_no_exporter_works(native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out")
    for command in (["doctor"], ["inspect", str(made.path)], ["--help"]):
        done = python(tmp_path, "-m", "fope_export", *command)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_is_what_it_is_here(target: str, native: Path, tmp_path: Path) -> None:
    """With all files that the package has, and their rights."""
    made = export(native, tmp_path / "out")
    command = ["deploy", str(made.path), "--target", target, "--unvalidated"]
    done = python(tmp_path, "-m", "fope_export", *command, "theirs")
    assert done.returncode == 0 and main([*command, str(tmp_path / "ours")]) == 0, done.stderr
    theirs, ours = (
        {str(path.relative_to(tmp_path / name)): path.stat().st_mode for path in (tmp_path / name).rglob("*")}
        for name in ("theirs", "ours")
    )
    assert theirs == ours


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("export CKPT new", "export"), ("optimize out", "export"), ("inspect CKPT", "export"), ("bench out", "cpu"),
        ("validate out", "validate"), ("run out --backend torch --prompt x", "export"), ("demo --out new", "cpu"),
    ],
)  # fmt: skip
def test_a_command_names_the_extra_that_it_lacks(command: str, extra: str, native: Path, tmp_path: Path) -> None:
    export(native, tmp_path / "out")
    done = python(tmp_path, "-m", "fope_export", *command.replace("CKPT", str(native)).split())
    assert done.returncode == 2 and re.search(rf"pip install '/.*\[{extra}\]'", done.stderr), done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_has_no_exporter_and_is_small(tmp_path: Path) -> None:
    installed = {name.replace("_", "-") for name in json.loads(python(tmp_path, "-c", INSTALLED).stdout)}
    assert {"fope-export", "onnxruntime"} <= installed and not ABSENT & installed
    whole = _megabytes(RUNTIME)
    needed = sum(
        _megabytes(path) for name in ("numpy", "onnxruntime") for path in RUNTIME.rglob(f"site-packages/{name}*")
    )
    assert needed > 100 and whole <= SIZE and whole - needed <= OWN, (whole, needed)


def _megabytes(path: Path) -> int:
    return int(subprocess.run(["du", "-sm", path], capture_output=True, text=True, check=True).stdout.split()[0])
