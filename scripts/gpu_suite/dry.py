"""The dry run: the suite's own code on the CPU, with the kernel's code compiled for it.

What stays untried is what needs a GPU: the kernel itself, CUDA graphs and events, Triton's compiled code.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_suite import benchmarks, cases, engine, library, proof, report, rivals
from gpu_suite.cases import Case, Finding, judge, make
from gpu_suite.stopwatch import HostStopwatch

CPU = torch.device("cpu")
ARCHITECTURE = "90"
SCALED = benchmarks.Model(4, 2, 64, 5, 7)
TIMED = (
    benchmarks.Row("prefill", Case(SCALED.shape(1, 24), last=None), warm=False, torch=True),
    benchmarks.Row("decode", Case(SCALED.shape(3, 1), "bf16", last=500), warm=True, torch=True),
    benchmarks.Row("decode", Case(SCALED.shape(2, 1), "fp32", last=500), warm=False, torch=False),
)
CACHE = 4096
MEMORY = 70 * 2**30
"""What an H100 has left beside torch; the largest row must fit."""


def rehearse(folder: Path, *, quick: bool) -> int:
    """0 where everything that can be tried here works."""
    compiled = library.compile_all(ARCHITECTURE, folder)
    plans = compiled.planned_fault or "plans"
    print(f"compiled for sm_{ARCHITECTURE}: kernel, empty kernel, sanitized program, {plans}")
    launch = library.compile_host(compiled.toolchain, folder)
    record, faults = proof.prove(launch, cases.cases(quick=quick), CPU)
    print(proof.line(record))
    faults += [f"{finding.name}: {finding.fault}" for finding in torch_forms(quick=quick) if finding.fault]
    bench = benchmarks.Bench(CPU, CACHE, launch, lambda: None, HostStopwatch(), rounds=3, repeats=2, compiling=False)
    results = [bench.run(row) for row in TIMED]
    faults += [f"{result['phase']}: {result['wrong']}" for result in results if result["wrong"]]
    faults += account()
    told: dict[str, Any] = {
        "timings": results, "aims": benchmarks.aims([r | {"kind": "fp16"} for r in results]), "checks": record,
        "sanitizer": {"memcheck": {"verdict": "not run"}}, "tensorrt_rtx": engine.run_plan(None, None),
    }  # fmt: skip
    with tempfile.TemporaryFile("w") as file:
        json.dump(told, file, allow_nan=False)
    print(report.table(told))
    print("\n".join(faults) if faults else "the dry run is green; its times mean nothing")
    return 1 if faults else 0


def torch_forms(*, quick: bool) -> list[Finding]:
    """The formulation that is timed against, held to the definition, and to the operator of fope_export."""
    chosen = [case for case in cases.cases(quick=quick) if not case.shift]
    findings = []
    for case in chosen:
        call = make(case, CPU)
        findings.append(judge(f"eager, {case}", call, rivals.eager(call), benchmarks.RIVAL_ULPS))
    try:
        from fope_export.fope.rotary import rotary
    except ImportError as missing:
        print(f"eager not compared with fope_export's operator: {missing}")
        return findings
    for case in chosen:
        call = make(case, CPU)
        if case.shape.D:
            operator = rotary(*call.arguments, True)
            same = all(torch.equal(a, b) for a, b in zip(rivals.eager(call), operator, strict=True))
            findings.append(Finding(f"operator, {case}", None, "" if same else "eager differs from the operator"))
    return findings


def account() -> list[str]:
    """Bytes of every row, counted again from the tensors, and whether the row fits into the GPU."""
    faults = []
    cache = 50 * 2**20
    every = benchmarks.rows(quick=False)
    for row in every:
        B, S, H, K, E, D, F, G = row.case.shape  # noqa: N806
        with torch.device("meta"):
            q, k = torch.empty(B, S, H, E, dtype=row.case.dtype), torch.empty(B, S, K, E, dtype=row.case.dtype)
            position_ids, coef = torch.empty(B, S, dtype=torch.int64), torch.empty(2, G, D, F)
        if row.bytes != 2 * q.nbytes + 2 * k.nbytes + position_ids.nbytes:
            faults.append(f"{row}: {row.bytes} bytes")
        if row.footprint != row.bytes + coef.nbytes + 4 * D:
            faults.append(f"{row}: footprint {row.footprint}")
        # inputs, results of ours, Triton and torch, a copy, and torch's float32 tensors in between
        needed = row.sets(cache) * row.footprint * 4 + 12 * row.elements * 4
        if needed > MEMORY:
            faults.append(f"{row}: {needed} bytes needed")
    moved = max(row.sets(cache) * row.footprint for row in every) / 1e9
    print(f"{len(every)} rows; the largest goes through {moved:.1f} GB of buffers")
    return faults
