"""What is installed and does not load is told with the reason, whatever it does instead."""

from dataclasses import replace
from pathlib import Path

import pytest

from fope_export.backends import loading
from fope_export.backends.choose import EXPORT, RUN, VALIDATE, abilities
from fope_export.backends.loading import MODULES, tried
from fope_export.backends.machine import PACKAGES, Machine, read_machine
from fope_export.tensorrt.api import LIBRARIES

RUNTIME = "onnxruntime"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine, with a runtime alone that `tmp_path` may spoil."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    read = read_machine()
    return replace(read, packages={name: read.packages[name] for name in (RUNTIME, *RUN)})


def test_all_that_is_claimed_is_loaded() -> None:
    assert {*EXPORT, *RUN, *VALIDATE, *LIBRARIES, RUNTIME, "onnxruntime-gpu", "openvino"} == set(MODULES)
    assert set(MODULES) <= set(PACKAGES)


def test_what_loads_is_no_cause_for_complaint() -> None:
    assert tried(read_machine()).broken == {}


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        ("raise ImportError('lib\\n.so.1: no such file')", "ImportError: lib .so.1: no such file"),
        ("import nothing_here", "ModuleNotFoundError: No module named 'nothing_here'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os.abort()", "it ends its process by SIGABRT"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "it takes more than 2 s"),
    ],
)
def test_what_does_not_load_is_told(
    spoilt: str, reason: str, here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{RUNTIME}.py").write_text(spoilt)
    monkeypatch.setattr(loading, "LIMIT", 2.0 if "sleep" in spoilt else 60.0)
    found = tried(here)
    assert found.broken == {RUNTIME: reason}
    told = f"{RUNTIME} {here.packages[RUNTIME]} is installed but does not load: {reason}"
    assert abilities(found)["run the bundle in ONNX Runtime on the CPU"] == told
