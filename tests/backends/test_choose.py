"""The choice of a backend, on machines that are not there."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fope_export.backends.choose import BACKENDS, EXPORT, PORTABLE, RUN, Settings, abilities, able, choose, fastest
from fope_export.backends.machine import Machine, read_machine
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.errors import BackendError, install
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.manifest import OPTIMIZED
from fope_export.parity import run
from fope_export.report import write_parity
from fope_export.validated import require_green


def machine(*packages: str, gpus: tuple[str, ...] = ()) -> Machine:
    return Machine("Linux x86_64", "3.11", 2, gpus, dict.fromkeys((*packages, *RUN), "10.13"))


FULL = machine("matplotlib", "polygraphy", "onnxruntime", *EXPORT)
EVERYTHING = machine(*FULL.packages, "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", gpus=("NVIDIA H100",))
BARE = machine(*EXPORT)


def test_the_usual_one_is_chosen_unless_another_is_asked_for() -> None:
    assert choose(None, FULL) == "onnxruntime"
    assert choose("torch", BARE) == "torch"
    assert choose(None, machine("torch", "onnxruntime-gpu")) == "onnxruntime"


@pytest.mark.parametrize(
    "given", [BARE, replace(EVERYTHING, packages=machine("torch", "tensorrt").packages)], ids=["bare", "GPU"]
)
def test_none_takes_the_place_of_the_usual_one(given: Machine) -> None:
    with pytest.raises(BackendError, match=r"onnxruntime is not installed: pip install .*\[run\]'") as caught:
        choose(None, given)
    assert "`run` can also take --backend " in caught.value.hint and "torch" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "export", "reason"),
    [
        ("1.22.1", PORTABLE, "onnxruntime is 1.22.1, and opset 23 needs 1.23: pip install 'onnxruntime>=1.23'"),
        ("1.23.2", PORTABLE, ""),
        ("1.23.2", ExportConfig(opset=24), "onnxruntime is 1.23.2, and opset 24 needs 1.24"),
        ("1.24.4", ExportConfig(opset=24), ""),
        ("1.24.4", ExportConfig(cache="static"), "onnxruntime is 1.24.4, and a static cache needs 1.25"),
        ("1.25.0", ExportConfig(cache="static"), ""),
        (
            "1.23.2",
            ExportConfig(quantize="int8-qdq"),
            "onnxruntime is 1.23.2, and int8-qdq or fp8-qdq or int4-awq or nvfp4 needs 1.24",
        ),
        (
            "1.31.0",
            ExportConfig(quantize="fp8-qdq", dtype="fp16"),
            "and int8-qdq or fp8-qdq or int4-awq or nvfp4 in fp16 needs 1.32",
        ),
        ("1.24.4", ExportConfig(quantize="fp8-qdq"), ""),
    ],
)
def test_a_version_that_cannot_run_a_bundle_is_named(version: str, export: ExportConfig, reason: str) -> None:
    given = replace(FULL, packages={**FULL.packages, "onnxruntime": version})
    if not reason:
        assert choose(None, given, export) == "onnxruntime"
        return
    with pytest.raises(BackendError, match=reason):
        choose(None, given, export)


@pytest.mark.parametrize(
    ("version", "portable", "static"), [("1.22", False, False), ("1.24", True, False), ("1.25", True, True)]
)
def test_abilities_tell_old_versions_apart(version: str, portable: bool, static: bool) -> None:
    said = abilities(replace(FULL, packages={**FULL.packages, "onnxruntime": version}))
    able = [not said[what] for what in ("validate a bundle", "run a static cache in ONNX Runtime")]
    assert able == [portable, static]


def test_a_refusal_gives_the_reason_and_the_next_step() -> None:
    with pytest.raises(BackendError, match=r"onnxruntime is not installed: pip install .*\[run\]'"):
        choose("onnxruntime", BARE)
    with pytest.raises(BackendError, match=r"torch cannot run here: torch not installed: .*\[export\]"):
        choose("torch", machine("onnxruntime"))
    with pytest.raises(BackendError, match="no backend 'tensorflow'") as caught:
        choose("tensorflow", FULL)
    assert "onnxruntime, openvino, onnxruntime-cuda, tensorrt, torch" in caught.value.hint


def test_abilities_name_what_is_missing() -> None:
    assert not any(abilities(EVERYTHING).values())
    missing = abilities(machine("torch"))
    assert (
        missing["export a checkpoint"] == f"onnx, onnx-ir, onnxscript, safetensors not installed: {install('export')}"
    )
    assert "onnxruntime" in missing["validate a bundle"]
    for needed in ("torch", "polygraphy"):
        packages = {name: version for name, version in FULL.packages.items() if name != needed}
        told = abilities(replace(FULL, packages=packages))["validate a bundle"]
        assert told == f"{needed} not installed: {install('validate')}"
    reasons = abilities(replace(FULL, without_compiler="no CUDA compiler"))
    assert reasons["compile the TensorRT plugin"] == "no CUDA compiler"
    assert install("gpu") in reasons["build for tensorrt"]


def test_what_does_not_load_is_no_ability() -> None:
    given = replace(EVERYTHING, broken={"tokenizers": "ImportError: no", "tensorrt-rtx": "OSError: no driver"})
    reasons = {what: reason for what, reason in abilities(given).items() if reason}
    assert set(reasons) == set(abilities(given)) - {
        "run its engine in TensorRT on a GPU", "build for tensorrt", "compile the TensorRT plugin"
    }  # fmt: skip
    assert reasons.pop("build for tensorrt-rtx").endswith(" is installed but does not load: OSError: no driver")
    assert set(reasons.values()) == {"tokenizers 10.13 is installed but does not load: ImportError: no"}


RTX = machine("torch", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            FULL,
            r"tensorrt is not installed: .*; tensorrt-rtx is not installed: pip install .*\[tensorrt-rtx\]'",
        ),
        (RTX, "no NVIDIA GPU found"),
        (replace(RTX, gpus=("NVIDIA H100",), packages={"tensorrt-rtx": "1.2.0"}), "tensorrt-rtx is 1.2.0, and 1.7 is"),
    ],
)
def test_tensorrt_refuses_with_the_reason(given: Machine, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        choose("tensorrt", given)


def test_tensorrt_needs_a_gpu_to_build_and_rtx_does_not() -> None:
    reasons = abilities(machine("tensorrt", "tensorrt-rtx"))
    assert "GPU" in reasons["build for tensorrt"] and not reasons["build for tensorrt-rtx"]


def held(dtype: str, *files: str) -> Any:
    """As much of a bundle as the choice looks at."""
    manifest = SimpleNamespace(
        files=dict.fromkeys(files, "0"), export=ExportConfig(dtype=dtype), optimized=OPTIMIZED * (OPTIMIZED in files)
    )
    return SimpleNamespace(path="out", manifest=manifest)


PLAIN, FAST = ("model.onnx", "model.onnx.data"), ("model.onnx", "model.onnx.data", OPTIMIZED)


@pytest.mark.parametrize(
    ("backend", "bundle", "optimized", "chosen"),
    [
        ("onnxruntime", held("fp32", *PLAIN), True, "portable"),
        ("onnxruntime", held("fp32", *FAST), True, "optimized"),
        ("onnxruntime", held("fp32", *FAST), False, "portable"),
        ("onnxruntime-cuda", held("fp16", *FAST), True, "optimized"),
        ("onnxruntime-cuda", held("fp16", *FAST), False, "optimized file in ONNX Runtime on a GPU is all that this"),
        ("onnxruntime-cuda", held("fp32", *FAST), True, "no optimized file in float16, which"),
        ("onnxruntime-cuda", held("fp16", *PLAIN), True, "no optimized file in float16, which"),
        ("tensorrt", held("fp16", *FAST), True, "out has no engine"),
        ("tensorrt", held("fp16", *FAST), False, "out has no engine"),
        ("torch", held("fp16", *FAST), False, "checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_variant_is_chosen_or_the_reason_is_given(backend: str, bundle: Any, optimized: bool, chosen: str) -> None:
    row = BACKENDS[backend]
    if chosen in [each.name for each in row.variants]:
        assert row.variant(bundle, optimized=optimized).name == chosen
        return
    with pytest.raises(BackendError, match=chosen) as caught:
        row.variant(bundle, optimized=optimized)
    assert caught.value.hint


def test_a_variant_is_had_by_its_name_and_knows_its_files() -> None:
    row, bundle = BACKENDS["onnxruntime"], held("fp32", *FAST, "config.json", "model.ort.onnx.data")
    assert row.variant(bundle, "portable").files(bundle) == PLAIN
    assert row.variant(bundle, "optimized").files(bundle) == (OPTIMIZED, "model.onnx.data", "model.ort.onnx.data")
    with pytest.raises(BackendError, match="has no optimized file"):
        row.variant(held("fp32", *PLAIN), "optimized")


def test_this_machine_is_read() -> None:
    given = read_machine()
    assert given.cores >= 1 and {"torch", "onnx", "onnxruntime"} <= set(given.packages)


@pytest.fixture(scope="module")
def halved(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An optimized bundle in float16."""
    return optimize(export(native, tmp_path_factory.mktemp("halved") / "out", ExportConfig(dtype="fp16")))


GPU = replace(EVERYTHING, architectures=("sm90",))


@pytest.mark.parametrize(
    ("given", "built", "half", "wanted", "reasons"),
    [
        (FULL, (), False, "onnxruntime", ("tensorrt: ", "onnxruntime-cuda: ")),
        (GPU, ("sm90",), True, "tensorrt", ()),
        (GPU, ("sm86", "sm120"), True, "onnxruntime-cuda", ("the engine is for sm86, sm120, and here is sm90",)),
        (GPU, None, True, "onnxruntime-cuda", ("has no engine",)),
        (GPU, (), False, "tensorrt", ()),  # built on the GPU at hand
        (GPU, None, False, "onnxruntime", ("has no engine", "has no optimized file in float16")),
        (replace(GPU, packages=FULL.packages), ("sm90",), True, "onnxruntime", ("onnxruntime-gpu is not installed",)),
    ],
)  # fmt: skip
def test_the_fastest_that_bundle_and_machine_have(
    given: Machine, built: tuple[str, ...] | None, half: bool, wanted: str, reasons: tuple[str, ...],
    bundle: Bundle, halved: Bundle, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = [] if built is None else [SimpleNamespace(architectures=built)]
    monkeypatch.setattr("fope_export.backends.choose.records", lambda bundle: made)
    name, told = fastest(halved if half else bundle, given)
    assert name == wanted and all(reason in told for reason in reasons)
    assert "torch" not in name and "torch: " not in told


def test_without_the_optimized_file_nothing_is_chosen_that_runs_it(
    halved: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fope_export.backends.choose.records", lambda bundle: [])
    assert fastest(halved, GPU)[0] == "onnxruntime-cuda"
    assert fastest(halved, GPU, optimized=False)[0] == "onnxruntime"


def test_validation_takes_all_that_the_machine_and_the_bundle_have(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is not there: its backend is the optimized file on the CPU."""
    bundle = optimize(export(native, tmp_path / "out", ExportConfig(dtype="fp16")))
    assert able(bundle, FULL) == ["onnxruntime"]
    assert able(bundle, EVERYTHING) == ["onnxruntime", "onnxruntime-cuda"]
    cpu, cuda = BACKENDS["onnxruntime"], BACKENDS["onnxruntime-cuda"]
    monkeypatch.setattr(run, "read_machine", lambda: EVERYTHING)
    here = replace(cuda, missing=lambda machine: "", variants=cpu.variants[1:], widens=True)
    monkeypatch.setitem(BACKENDS, "onnxruntime-cuda", here)
    result = run.validate(bundle, lengths=(7,))
    assert result.passed and result.backend == "onnxruntime, onnxruntime-cuda"
    write_parity(bundle, result)
    tested = [(each.backend, each.variant) for each in require_green(Bundle.open(bundle.path))]
    optimized = ("onnxruntime-cuda", "optimized")
    assert tested == [("onnxruntime", "portable"), ("onnxruntime", "optimized"), optimized]

    def broken(bundle: Bundle, settings: Settings) -> Any:
        raise BackendError("no kernel image", hint="")

    spoilt = replace(here, variants=(replace(here.variants[0], load=broken),))
    monkeypatch.setitem(BACKENDS, "onnxruntime-cuda", spoilt)
    assert run.validate(bundle, lengths=(7,)).failures == ["backend: onnxruntime-cuda: no kernel image"]
    assert run.validate(bundle, lengths=(7,), backend="onnxruntime").passed
