"""Imports run one way (the contracts are in pyproject.toml), and nothing heavy loads before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

import fope_export

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "matplotlib",
    "rich",
    "polygraphy",
    "tokenizers",
    "msgspec",
}


def test_imports_run_one_way() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("code", ["import fope_export", "from fope_export.cli import main; main(['--help'])"])
def test_nothing_heavy_loads_early(code: str) -> None:
    script = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())


def test_the_doctor_needs_no_torch() -> None:
    script = "import sys\nfrom fope_export.cli import main\nmain(['doctor'])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "matplotlib"} & set(done.stderr.split())


def test_the_public_door_opens_on_every_name() -> None:
    assert 8 <= len(fope_export.__all__) <= 17
    for name in fope_export.__all__:
        assert getattr(fope_export, name).__name__ == name
        assert name in dir(fope_export)
    with pytest.raises(AttributeError):
        fope_export.nothing  # noqa: B018
