"""The choice of a backend, on machines that are not there."""

import pytest

from fope_export.backends.choose import Machine, abilities, choose, read_machine
from fope_export.errors import BackendError


def machine(*packages: str, gpus: tuple[str, ...] = ()) -> Machine:
    return Machine("Linux x86_64", "3.11", 2, gpus, dict.fromkeys(packages, "1.0"))


FULL = machine("torch", "onnx", "onnxscript", "onnxruntime")
BARE = machine("torch", "onnx", "onnxscript")


def test_the_best_that_runs_is_chosen() -> None:
    assert choose(None, FULL) == "onnxruntime"
    assert choose(None, BARE) == "torch"
    assert choose("torch", FULL) == "torch"
    assert choose(None, machine("torch", "onnxruntime-gpu")) == "onnxruntime"


def test_a_refusal_gives_the_reason_and_the_next_step() -> None:
    with pytest.raises(BackendError, match=r"onnxruntime is not installed: pip install 'fope-export\[cpu\]'"):
        choose("onnxruntime", BARE)
    with pytest.raises(BackendError, match="no backend 'tensorflow'") as caught:
        choose("tensorflow", FULL)
    assert "onnxruntime, torch" in caught.value.hint


def test_abilities_name_what_is_missing() -> None:
    assert not any(reason for what, reason in abilities(FULL).items() if "GPU" not in what)
    missing = abilities(machine("torch"))
    assert missing["export a checkpoint"] == "onnx, onnxscript not installed"
    assert "onnxruntime" in missing["validate a bundle"]
    assert (
        abilities(machine(gpus=("NVIDIA H100",)))["use a GPU"] == "found NVIDIA H100; nothing in this version uses one"
    )


def test_this_machine_is_read() -> None:
    found = read_machine()
    assert found.cores >= 1 and {"torch", "onnx", "onnxruntime"} <= set(found.packages)
