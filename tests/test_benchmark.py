"""Only what is proven right is timed, everybody in turn, and the report says who was not and why."""

import io
import json
import os
import re
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from fope_export.backends.choose import BACKENDS, load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bench_report import bench_page, bench_record, print_bench, read_old, write_bench
from fope_export.benchmark import run
from fope_export.benchmark.compiled import Compiled
from fope_export.benchmark.contenders import (
    ALLOWED,
    COMPILED,
    CONTENDERS,
    EAGER,
    GRAPH,
    IN_OPENVINO,
    OURS,
    PEERS,
    TWIN,
    Stepping,
)
from fope_export.benchmark.greedy import answer, distance, scores
from fope_export.benchmark.lead import leads
from fope_export.benchmark.process import Worker
from fope_export.benchmark.run import BenchConfig, BenchResult, Entry, bench, prompt
from fope_export.benchmark.twin import write_twin
from fope_export.bundle import Bundle, finish_manifest, sha256
from fope_export.cli import main
from fope_export.errors import BackendError, BundleError, ConfigError
from fope_export.graph.optimize import optimize
from fope_export.manifest import MANIFEST
from fope_export.model.checkpoint import load_checkpoint, source_of
from fope_export.parity.run import validate
from fope_export.report import write_parity
from fope_export.validated import require_green
from tests.printed import held

SMALL = BenchConfig(lengths=(8, 16), batch=(1, 2), rounds=2, decoded=2, threads=1, backends=("onnxruntime",))
Capture = pytest.CaptureFixture[str]


def away_of(entry: Entry) -> float:
    """How far it is from eager PyTorch."""
    assert entry.away is not None
    return entry.away


@pytest.fixture(scope="module")
def green(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    copy = optimize(Bundle.open(shutil.copytree(bundle.path, tmp_path_factory.mktemp("green") / "bundle")))
    return write_parity(copy, validate(copy, lengths=(1, 64)))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch.compile, which takes its time."""
    monkeypatch.delitem(CONTENDERS, COMPILED)


@pytest.fixture(scope="module")
def measured(green: Bundle) -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(CONTENDERS, COMPILED)
        return bench(green, SMALL)


def test_every_contender_is_timed_in_every_round(measured: BenchResult) -> None:
    timed = {(cell.contender, cell.length, cell.batch) for cell in measured.cells}
    assert timed == {(name, n, b) for name in (EAGER, "onnxruntime", OURS) for n in (8, 16) for b in (1, 2)}
    for cell in measured.cells:
        assert not cell.refused and len(cell.first) == len(cell.next) == SMALL.rounds
        assert min(cell.first + cell.next) > 0 and (cell.peak or 0) > 1 << 20 and measured.share(cell) > 0
        assert (measured.speed(cell, "next") == 1) == (cell.contender == EAGER)
    entries = [entry for entry in measured.entries if not entry.refused]
    assert all(away_of(entry) <= ALLOWED["fp32"] and entry.weight_bytes for entry in entries)
    assert {entry.name for entry in measured.entries if entry.validated} == {"onnxruntime", OURS}


def test_every_variant_of_a_backend_is_a_contender_of_its_own() -> None:
    rows = {name: (row.backend, row.variant) for name, row in CONTENDERS.items() if row.backend and not row.twin}
    wanted = {(name, each.name) for name, row in BACKENDS.items() for each in row.variants if name != EAGER}
    assert {*rows.values()} == wanted
    assert [rows["onnxruntime"], rows[OURS]] == [("onnxruntime", "portable"), ("onnxruntime", "optimized")]


CUDA = "onnxruntime-cuda"


def test_what_is_recorded_in_a_graph_is_timed_on_a_gpu_only() -> None:
    recorded = {COMPILED + GRAPH, CUDA + GRAPH}
    assert not recorded & {*run._chosen(BenchConfig())}
    both = {*run._chosen(BenchConfig(), rounding=True)} - {*run._chosen(BenchConfig())}
    assert both == {"onnxruntime, cache rounded", "openvino, cache rounded"}
    assert recorded < {*run._chosen(BenchConfig(device="cuda"))}
    assert {*run._chosen(BenchConfig(device="cuda", backends=(CUDA,)))} == {EAGER, COMPILED, CUDA, *recorded}


@pytest.mark.whole
def test_sittings_begin_in_new_processes(
    green: Bundle, measured: BenchResult, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Counted(Worker):
        def __init__(self, threads: int) -> None:
            begun.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(run, "Worker", Counted)
    config = msgspec.structs.replace(SMALL, lengths=(8,), batch=(1,), sittings=3)
    result = bench(green, config)
    assert len(begun) == 3 * 3
    assert [(cell.contender, len(cell.first), len(cell.next)) for cell in result.cells] == [
        (name, 6, 6) for name in (EAGER, "onnxruntime", OURS)
    ]
    cells = [run.Cell(EAGER, 8, 1, (1.0,), (1.0,), 7), run.Cell(EAGER, 8, 1, refused="no memory")]
    assert run._joined(cells).refused == "no memory"


def test_ratios_are_medians_of_rounds(measured: BenchResult) -> None:
    def cell(name: str, seconds: tuple[float, ...]) -> run.Cell:
        return run.Cell(name, 8, 2, seconds, seconds, 1)

    cells = (cell(EAGER, (1.0, 30.0, 6.0)), cell("onnxruntime", (1.0, 10.0, 1.0)))
    result = msgspec.structs.replace(SMALL, rounds=3), 1, {"read": 1e9}, measured.entries, cells, measured.model, 4
    assert BenchResult(*result).speed(cells[1], "next") == 3.0
    assert BenchResult(*result).tokens_per_second(cells[0], "first") == 16 / 6


def test_the_record_the_page_and_the_table(green: Bundle, measured: BenchResult, tmp_path: Path) -> None:
    record = held("bench", msgspec.json.encode(bench_record(green, measured)))
    assert record["model_sha256"] == green.manifest.files["model.onnx"] and record["machine"]["processor"]
    assert len(record["cells"]) == 12 and record["bandwidth_GB_per_s"]["read"] > 0
    page = bench_page(green, measured)
    loaded = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
    assert all(link.startswith("#") for link in loaded) and "<script" not in page
    assert page.count("<svg") == 2 and "onnxruntime" in page
    assert write_bench(green, measured, tmp_path / "new").parent == tmp_path / "new"
    old = read_old(tmp_path / "new" / "bench.json")
    console = Console(width=200, file=(written := io.StringIO()))
    print_bench(green, measured, console, old)
    told = written.getvalue()
    assert "decode / old" in told and told.count("1.00") >= 8
    write_bench(green, measured)
    assert "reports/bench.json" in Bundle.open(green.path).manifest.files


def test_reports_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "parity.json").write_text('{"cases": []}')
    with pytest.raises(ConfigError, match=r"parity.json is not a benchmark's record"):
        read_old(tmp_path / "parity.json")


def test_what_is_not_validated_is_not_timed(spoilable: Bundle, capsys: Capture) -> None:
    assert main(["bench", str(spoilable.path)]) == 2
    told = capsys.readouterr().err
    assert "was not validated" in told and f"fope-export validate {spoilable.path}" in "".join(told.split("\n"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": False}, "FAILED"),
        ({"passed": None}, "FAILED"),
        ({"files": {}}, "other files"),
        ({"files": {"model.onnx": "0"}}, "other files"),
        ({"tested": []}, "other files"),
        ({"tested": [{"backend": "onnxruntime", "variant": "portable", "files": {"model.onnx": "0"}}]}, "other files"),
        ({"tested": [{"backend": "tensorrt", "variant": "engine", "files": {"engines/a.plan": "0"}}]}, "other files"),
        ({"tested": None}, "is not a report"),
        (None, "is not a report"),
    ],
)
def test_what_was_not_proven_is_not_timed(change: dict[str, object] | None, message: str, green: Bundle) -> None:
    path = green.path / "reports/parity.json"
    kept = path.read_text()
    path.write_text("nonsense" if change is None else json.dumps(json.loads(kept) | change))
    try:
        with pytest.raises(BundleError, match=message) as caught:
            require_green(green)
        assert "fope-export validate" in caught.value.hint
    finally:
        path.write_text(kept)
    require_green(green)


def test_a_wrong_contender_is_not_timed(green: Bundle, tmp_path: Path, uncompiled: None) -> None:
    """Even where a report that is not true says that it is right."""
    folder = Path(shutil.copytree(green.path, tmp_path / "bundle"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "sin_pad":
                attribute.f = 0.0
    onnx.save(model, folder / "model.onnx")
    forged = json.loads((folder / "reports/parity.json").read_text())
    forged["files"]["model.onnx"] = forged["tested"][0]["files"]["model.onnx"] = sha256(folder / "model.onnx")
    (folder / "reports/parity.json").write_text(json.dumps(forged))
    (folder / MANIFEST).unlink()
    finish_manifest(folder, green.manifest)
    result = bench(Bundle.open(folder), msgspec.structs.replace(SMALL, lengths=(8,), batch=(1,), rounds=1))
    entry = next(entry for entry in result.entries if entry.name == "onnxruntime")
    assert entry.refused == "it does not compute what eager PyTorch computes"
    assert entry.allowed is not None and away_of(entry) > entry.allowed
    assert {cell.contender for cell in result.cells} == {EAGER, OURS}  # whose file is as it was


def test_a_model_is_near_itself_and_away_from_another(bundle: Bundle, rope_bundle: Bundle) -> None:
    referee = Stepping(EagerBackend(source_of(bundle).model))
    prompts = np.array(prompt(2, 24, 256))

    def away(other: Bundle) -> float:
        contender = Stepping(load_backend(other))
        tokens = answer(contender, prompts, 8)
        return distance(scores(referee, prompts, tokens), scores(contender, prompts, tokens), tokens)

    assert away(bundle) <= ALLOWED["fp32"] < 30 * ALLOWED["fp32"] < away(rope_bundle)


def test_tokens_that_nobody_would_choose_are_away_whatever_the_logits() -> None:
    logits = np.zeros((1, 2, 8), np.float32)
    logits[..., 3] = 1
    assert distance(logits, logits, np.array([[3, 3]])) == 0
    assert distance(logits, logits, np.array([[3, 4]])) == 0.5
    assert distance(logits, -logits, np.array([[3, 3]])) == pytest.approx(2)


@pytest.mark.parametrize("length", [1, 7, 515], ids=lambda n: f"{n} tokens")
def test_the_compiled_contender_computes_what_eager_does(length: int, bundle: Bundle) -> None:
    """Its own arithmetic; that it compiles is another test."""
    model, other = source_of(bundle).model, source_of(bundle).model
    prompts, eager, contender = np.array(prompt(3, length, 256)), Stepping(EagerBackend(model)), Compiled(other)
    torch.compiler.set_stance("force_eager")
    try:
        tokens = answer(contender, prompts, 6)
        assert distance(scores(eager, prompts, tokens), scores(contender, prompts, tokens), tokens) <= ALLOWED["fp32"]
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.whole
def test_torch_compile_takes_the_whole_step(green: Bundle) -> None:
    checked = {"lengths": (run.CHECKED,), "batch": (2,), "decoded": run.ANSWERED - 1}  # no more shapes to compile
    result = bench(green, msgspec.structs.replace(SMALL, rounds=1, **checked))
    entry = next(entry for entry in result.entries if entry.name == COMPILED)
    assert not entry.refused and {cell.contender for cell in result.cells} == {EAGER, COMPILED, "onnxruntime", OURS}


def test_a_size_without_room_says_so(static_bundle: Bundle, tmp_path: Path, uncompiled: None) -> None:
    bundle = Bundle.open(shutil.copytree(static_bundle.path, tmp_path / "bundle"))
    bundle = write_parity(bundle, validate(bundle, lengths=(1, 64)))
    config = msgspec.structs.replace(SMALL, lengths=(8, 250), batch=(1,), rounds=1)
    result = bench(bundle, config)
    refusals = {(cell.contender, cell.length): cell.refused for cell in result.cells}
    assert "there is room for 200" in refusals["onnxruntime", 250] and not refusals["onnxruntime", 8]
    assert not refusals[EAGER, 250] and "room for 200" in bench_page(bundle, result)


def test_peers_run_the_twin_by_their_own_exporters(green: Bundle, tmp_path: Path, uncompiled: None) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs fope-export[peers]")
    pytest.importorskip("optimum.onnxruntime", reason="needs fope-export[peers]")
    bundle = optimize(Bundle.open(shutil.copytree(green.path, tmp_path / "bundle")), "openvino")
    bundle = write_parity(bundle, validate(bundle, lengths=(1, 64)))
    result = bench(bundle, msgspec.structs.replace(SMALL, peers=PEERS, rounds=1))
    peers = {entry.name: entry for entry in result.entries if CONTENDERS[entry.name].peer}
    theirs = {"genai": ("", " fp32", " int4"), "optimum": (" fp32",), "llama.cpp": (" fp32", " int8", " int4")}
    theirs["openvino genai"] = ("", " fp32", " default", " int4")
    theirs["optimum-intel"] = (" fp32", " default", " int4")
    named = {f"{name}{kind}" for name, kinds in theirs.items() for kind in kinds}
    assert peers.keys() == named | {TWIN, f"{OURS}, RoPE twin", f"{IN_OPENVINO}, RoPE twin"}
    refused = {name: entry.refused for name, entry in peers.items() if entry.refused}
    absent = {"llama.cpp": "llama_cpp", "optimum-intel": "optimum.intel"}
    missing = tuple(name for name, package in absent.items() if not find_spec(package))
    assert refused.keys() == {name for name in named if missing and name.startswith(missing)}
    assert all(re.search("pip install llama-cpp-python|scripts/venv intel", reason) for reason in refused.values())
    exact = [entry for name, entry in peers.items() if name.endswith(" fp32") and not entry.refused]
    assert all(away_of(entry) <= ALLOWED["fp32"] for entry in exact)
    assert peers["genai int4"].weight_bytes < peers["genai fp32"].weight_bytes
    assert peers["openvino genai int4"].weight_bytes < peers["openvino genai fp32"].weight_bytes
    assert "genai int4 *" in bench_page(bundle, result)
    led = [*leads(result, bundle.manifest.export)]
    assert [lead.what for lead in led[:3]] == ["prefill", "decode", "memory"]
    assert all(lead.peer.endswith(" fp32") and CONTENDERS[lead.ours].backend and lead.ratio > 0 for lead in led)
    assert str(led[0]) in bench_page(bundle, result)


def test_the_twin_is_a_model_of_the_same_sizes(bundle: Bundle, tmp_path: Path) -> None:
    config = bundle.manifest.decoder()
    twin = load_checkpoint(write_twin(config, tmp_path / "twin")).config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(twin, name) == getattr(config, name)
    assert twin.spectrum.sin_pad == 0 and twin.spectrum.frequencies == twin.spectrum.head_dim // 2
    with pytest.raises(ConfigError, match="no norm of queries"):
        write_twin(msgspec.structs.replace(config, qk_norm=True), tmp_path / "other")


def test_a_worker_tells_why_and_how_it_ended() -> None:
    with Worker(1) as worker:
        for request in ("dance", "__init__", "answer_all"):
            with pytest.raises(BackendError, match=f"ValidationError: Invalid value '{request}'"):
                worker.ask(request)
        with pytest.raises(BackendError, match="no contender was loaded"):
            worker.ask("time", prompts=[[1]], new=2)
        with pytest.raises(BackendError, match="unknown field `more`"):
            worker.ask("bandwidth", more=1)
        os.killpg(worker._process.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="ended with -9"):
            worker.ask("bandwidth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "tpu"], "there is no 'tpu'"),
        (["--backends", "torch"], "there is no 'torch'"),
        (["--peers", "vllm"], "there is no 'vllm'"),
        (["--lengths", "0"], "lengths"),
        (["--rounds", "0"], "rounds"),
        (["--compare", "nowhere.json"], "nowhere.json"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_misuse(arguments: list[str], message: str, bundle: Bundle, capsys: Capture) -> None:
    assert main(["bench", str(bundle.path), *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err and "\nhint:  " in told.err and not told.out
