"""The choice of a backend, on machines that are not there."""

from dataclasses import replace

import pytest

from fope_export.backends.choose import Machine, abilities, choose, read_machine
from fope_export.errors import BackendError


def machine(*packages: str, gpus: tuple[str, ...] = ()) -> Machine:
    return Machine("Linux x86_64", "3.11", 2, gpus, dict.fromkeys(packages, "10.13"))


FULL = machine("torch", "onnx", "onnxscript", "onnxruntime")
EVERYTHING = machine(*FULL.packages, "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", gpus=("NVIDIA H100",))
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
    assert "onnxruntime, onnxruntime-cuda, tensorrt, torch" in caught.value.hint


def test_abilities_name_what_is_missing() -> None:
    assert not any(abilities(EVERYTHING).values())
    missing = abilities(machine("torch"))
    assert missing["export a checkpoint"] == "onnx, onnxscript not installed"
    assert "onnxruntime" in missing["validate a bundle"]
    reasons = abilities(replace(FULL, without_compiler="no CUDA compiler"))
    assert reasons["compile the TensorRT plugin"] == "no CUDA compiler"
    assert "fope-export[gpu]" in reasons["build for tensorrt"]


RTX = machine("torch", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            FULL,
            r"tensorrt is not installed: .*; tensorrt-rtx is not installed: pip install 'fope-export\[tensorrt-rtx\]'",
        ),
        (RTX, "no NVIDIA GPU found"),
        (replace(RTX, gpus=("NVIDIA H100",), packages={"tensorrt-rtx": "1.2.0"}), "tensorrt-rtx is 1.2.0, and 1.7 is"),
    ],
)
def test_tensorrt_refuses_with_the_reason(found: Machine, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        choose("tensorrt", found)


def test_tensorrt_needs_a_gpu_to_build_and_rtx_does_not() -> None:
    reasons = abilities(machine("tensorrt", "tensorrt-rtx"))
    assert "GPU" in reasons["build for tensorrt"] and not reasons["build for tensorrt-rtx"]


def test_this_machine_is_read() -> None:
    found = read_machine()
    assert found.cores >= 1 and {"torch", "onnx", "onnxruntime"} <= set(found.packages)
