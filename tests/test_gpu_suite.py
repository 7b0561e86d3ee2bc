"""The GPU suite, as far as it goes without a GPU: its dry run, its checks, and its whole course on a pretended GPU."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_suite import __main__ as program
from gpu_suite import benchmarks, cases, dry, library, proof, sanitizer

from fope_export.errors import BackendError
from fope_export.tensorrt import compile as compiling

ROOT = Path(__file__).parent.parent


CPU = torch.device("cpu")


def suite(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "gpu_suite.sh"), *arguments]
    environ = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environ}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


@pytest.fixture(scope="module")
def launch(toolchain: compiling.Toolchain, tmp_path_factory: pytest.TempPathFactory) -> cases.Launch:
    return library.compile_host(toolchain, tmp_path_factory.mktemp("host"))


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = suite("--out", str(tmp_path / "result.json"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "no GPU here" in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.whole
def test_the_dry_run(toolchain: compiling.Toolchain) -> None:
    done = suite("--dry-run", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the dry run is green" in done.stdout and "definition agrees" in done.stdout


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("control", [None, *cases.GENERAL_CONTROLS])
def test_a_wrong_general_call_is_noticed(launch: cases.Launch, kind: str, control: str | None) -> None:
    call = cases.make(cases.Case(cases.CONTROLLED, kind, axes=3, bases=2, whole=False), CPU)
    given = cases.GENERAL_CONTROLS[control](call) if control else call
    assert bool(cases.check(launch, call, given).fault) == bool(control)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("control", [None, *cases.CONTROLS])
def test_a_wrong_call_is_noticed(launch: cases.Launch, kind: str, control: str | None) -> None:
    call = cases.make(cases.Case(cases.CONTROLLED, kind), CPU)
    given = cases.CONTROLS[control](call) if control else call
    assert bool(cases.check(launch, call, given).fault) == bool(control)


@pytest.mark.parametrize("offset", [-1, 0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_write_beside_an_output_is_noticed(launch: cases.Launch, which: int, offset: int) -> None:
    def spoilt(call: cases.Call, *outputs: torch.Tensor) -> None:
        launch(call, *outputs)
        beside = outputs[which].numel() if offset == 0 else offset
        outputs[which].as_strided((1,), (1,), outputs[which].storage_offset() + beside).zero_()

    call = cases.make(cases.Case(cases.CONTROLLED, shift=1), CPU)
    assert "outside" in cases.check(spoilt, call).fault


def test_one_element_that_is_not_written_is_noticed(launch: cases.Launch) -> None:
    def spoilt(call: cases.Call, *outputs: torch.Tensor) -> None:
        launch(call, *outputs)
        outputs[1].view(-1)[-1] = torch.nan

    assert "NaN" in cases.check(spoilt, cases.make(cases.Case(cases.CONTROLLED), CPU)).fault


def test_a_refusal_of_the_library_is_a_fault(launch: cases.Launch) -> None:
    call = cases.make(cases.Case(cases.CONTROLLED), CPU)
    wrong = replace(call, case=replace(call.case, shape=call.case.shape._replace(F=25)))
    assert "FOPE_ROTARY_SHAPE" in cases.check(launch, call, wrong).fault


def test_spacing_is_that_of_the_type() -> None:
    for kind in cases.KINDS.values():
        one = torch.tensor([1.0, 1.5, 2.0, 0.0], dtype=torch.float64)
        eps, tiny = torch.finfo(kind.torch).eps, torch.finfo(kind.torch).smallest_normal
        assert kind.spacing(one).tolist() == [eps, eps, 2 * eps, tiny * eps]


def test_a_header_that_moves_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    header = library.HEADER.replace("    float sign;", "    float sign;\n    int32_t added; // a reason; and more")
    members = library.fields(header, "FopeRotaryArguments")
    assert members[-1] == ("added", ctypes.c_int32) and members[0] == ("q", ctypes.c_void_p)

    class Moved(ctypes.Structure):
        _fields_ = tuple(members)

    monkeypatch.setattr(library, "Arguments", Moved)
    call = cases.make(cases.Case(cases.CONTROLLED), CPU)
    with pytest.raises(BackendError, match="added"):
        library.arguments(call, call.q, call.k)


def test_a_tool_that_says_nothing_has_not_found_nothing() -> None:
    assert sanitizer.verdict(0, "========= ERROR SUMMARY: 0 errors") == "clean"
    assert sanitizer.verdict(0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == "clean"
    assert sanitizer.verdict(sanitizer.FOUND, "========= ERROR SUMMARY: 3 errors") == "findings"
    assert sanitizer.verdict(0, "") == sanitizer.verdict(1, "ERROR SUMMARY: 0 errors") == "did not run"


class Pretended:
    """torch.cuda's graphs, streams and events; a replay does nothing and takes a millisecond."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Callable[..., float]:
        return lambda *_: 1.0


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, launch: cases.Launch, tmp_path: Path) -> program.Suite:
    """A suite on a GPU that is the CPU, with few cases; nothing is compiled."""
    properties = {"name": "Pretended", "total_memory": 1, "L2_cache_size": dry.CACHE, "multi_processor_count": 1}
    fakes: dict[str, Any] = dict.fromkeys(("CUDAGraph", "Event", "Stream"), Pretended) | {
        "get_device_capability": lambda _: (9, 0),
        "get_device_properties": lambda _: SimpleNamespace(**properties, major=9, minor=0),
        **dict.fromkeys(("graph", "stream"), lambda _: contextlib.nullcontext()),
        **dict.fromkeys(("synchronize", "_sleep", "current_stream", "empty_cache"), lambda *_: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    nowhere = tmp_path / "nowhere"
    toolchain = SimpleNamespace(nvcc=nowhere / "nvcc", nvcc_version="13")
    compiled = library.Compiled(toolchain, nowhere, nowhere, nowhere, nowhere, "")  # type: ignore[arg-type]
    monkeypatch.setattr(library, "compile_all", lambda *_: compiled)
    monkeypatch.setattr(library.Compiled, "launch", lambda _: launch)
    monkeypatch.setattr(library.Compiled, "with_plan", lambda *_: launch)
    monkeypatch.setattr(library.Compiled, "nothing", lambda _: lambda: None)
    monkeypatch.setattr(sanitizer, "run", lambda *_: (0, "ERROR SUMMARY: 0 errors"))
    monkeypatch.setattr(cases, "cases", lambda **_: [cases.Case(cases.CONTROLLED)])
    monkeypatch.setattr(benchmarks, "rows", lambda **_: [replace(row, torch=False) for row in dry.TIMED])
    arguments = program.read_arguments(["--quick", "--tune", "--out", str(tmp_path / "new" / "result.json")])
    made = program.Suite(arguments, tmp_path)
    made.device = CPU
    return made


def test_the_whole_course(pretended: program.Suite, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretended.run() == 0
    record = json.loads(pretended.args.out.read_text())
    assert record["complete"] and record["machine"]["device"] == "Pretended"
    assert record["checks"]["count"] == 1 + 36 and record["checks"]["controls"] == 33
    assert [timing["again_over_ours"] for timing in record["timings"]] == [1, 1, 1]
    assert {f"tile {tile}, {n} threads" for tile, n in program.TUNED} < record["timings"][0]["microseconds"].keys()
    assert "prefill fp16 B1 S24" in capsys.readouterr().out


def test_benchmarks_are_refused_on_a_red_check(
    pretended: program.Suite, launch: cases.Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_off(call: cases.Call, *outputs: torch.Tensor) -> None:
        launch(replace(call, position_ids=call.position_ids + 1), *outputs)

    monkeypatch.setattr(library.Compiled, "launch", lambda _: one_off)
    assert pretended.run() == 1
    record = json.loads(pretended.args.out.read_text())
    assert record["checks"]["failed"] == 1 and "timings" not in record


def test_a_check_that_lets_a_wrong_call_pass_is_red(launch: cases.Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CONTROLS, "nothing wrong", lambda call: call)
    record, faults = proof.prove(launch, [cases.Case(cases.CONTROLLED)], CPU)
    assert record["controls_passed"] == 3 and faults[0] == "not noticed: fp32: nothing wrong"


def test_findings_of_the_sanitizer_are_red(pretended: program.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "sanitize", lambda *_: {"memcheck": {"verdict": "findings", "output": "3 errors"}})
    assert pretended.run() == 1
    assert "timings" not in json.loads(pretended.args.out.read_text())
