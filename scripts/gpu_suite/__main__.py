"""The suite's order: compile, prove, sanitize, time, report.

    scripts/gpu_suite.sh                     everything; writes scripts/results/gpu_suite.json (minutes)
    scripts/gpu_suite.sh --quick             fewer cases and shapes
    scripts/gpu_suite.sh --tune              also other tiles and blocks than the library's choice
    scripts/gpu_suite.sh --plan FILE         also a TensorRT-RTX plan (--plugin LIBRARY, unless the plan carries it)
    scripts/gpu_suite.sh --dry-run           what can be tried without a GPU, on the CPU; writes nothing

Exit code 0: proved and timed. 1: a check failed; where it is a check of the kernel, nothing was timed. 2: not run.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

from gpu_suite import report

RESULT = Path(__file__).parent.parent / "results" / "gpu_suite.json"
ROUNDS, QUICK_ROUNDS = 40, 15
TUNED = [*product((1, 4, 8), (64, 128, 256))]
"""Tokens a block, threads a block."""
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_suite.sh", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = read_arguments(argv)
    if importlib.util.find_spec("torch") is None:
        return refuse("torch is not installed")
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        return refuse("no GPU here: torch finds no CUDA device. (--dry-run tries what needs none)")
    from fope_export.errors import BackendError

    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.dry_run:
                from gpu_suite.dry import rehearse

                return rehearse(Path(folder), quick=args.quick)
            return Suite(args, Path(folder)).run()
    except BackendError as error:
        return refuse(f"{error}. {error.hint}")


def refuse(reason: str) -> int:
    print(f"gpu_suite: {reason}", file=sys.stderr)
    return 2


class Suite:
    """One run, and its record, which is on disk after every step: a run cut short leaves what it found."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        import torch

        self.args, self.folder, self.device = args, folder, torch.device("cuda")
        self.record: dict[str, Any] = {"complete": False}

    def keep(self, **parts: Any) -> None:
        self.record |= parts
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(self.record, indent=1, allow_nan=False) + "\n")

    def run(self) -> int:
        from gpu_suite import engine, library, sanitizer

        major, minor = self._capability()
        compiled = library.compile_all(f"{major}{minor}", self.folder)
        self.keep(machine=machine(compiled.toolchain.nvcc_version), quick=self.args.quick)
        faults = self.prove(compiled)
        print("sanitizer")
        self.keep(sanitizer=sanitizer.sanitize(compiled.sanitized, compiled.toolchain.nvcc))
        faults += [f"sanitizer, {k}" for k, v in self.record["sanitizer"].items() if v["verdict"] == "findings"]
        if faults:
            print("\n".join(("", "red: benchmarks are refused", *faults)), file=sys.stderr)
            return 1
        wrong = self.time(compiled)
        self.keep(tensorrt_rtx=engine.run_plan(self.args.plan, self.args.plugin))
        self.keep(machine_after=smi(), complete=True)
        print("\n" + report.table(self.record))
        print(self.args.out)
        if wrong:
            print("\n".join(("", "red: these were wrong, and not timed", *wrong)), file=sys.stderr)
        return 1 if wrong else 0

    def _capability(self) -> tuple[int, int]:
        import torch

        capability: tuple[int, int] = torch.cuda.get_device_capability(self.device)
        return capability

    def prove(self, compiled: Any) -> list[str]:
        """Every check of the kernel; what failed."""
        from gpu_suite import cases, proof

        started = time.perf_counter()
        large = () if self.args.quick else (cases.LONG, cases.BEYOND_32_BITS)
        chosen = [*cases.cases(quick=self.args.quick), *large]
        planned = compiled.with_plan if compiled.planned else None
        record, faults = proof.prove(compiled.launch(), chosen, self.device, planned)
        self.keep(
            checks=record | {"seconds": round(time.perf_counter() - started, 1), "planned": compiled.planned_fault}
        )
        print(proof.line(record))
        return faults

    def time(self, compiled: Any) -> list[str]:
        """Every benchmark; what was wrong."""
        import torch

        from gpu_suite import benchmarks
        from gpu_suite.stopwatch import GraphStopwatch

        tuned = TUNED if self.args.tune and compiled.planned else ()
        plans = tuple((f"tile {tile}, {n} threads", compiled.with_plan(tile, 0, n)) for tile, n in tuned)
        bench = benchmarks.Bench(
            self.device, torch.cuda.get_device_properties(self.device).L2_cache_size, compiled.launch(),
            compiled.nothing(), GraphStopwatch(), QUICK_ROUNDS if self.args.quick else ROUNDS, plans=plans,
        )  # fmt: skip
        results: list[dict[str, Any]] = []
        for row in benchmarks.rows(quick=self.args.quick):
            started = time.perf_counter()
            try:
                results.append(bench.run(row))
            except RuntimeError as error:  # memory, or a GPU on which nothing works any more
                results.append(benchmarks.facts(row) | {"wrong": {"row": str(error)[:500]}})
            torch.cuda.empty_cache()
            self.keep(timings=results, aims=benchmarks.aims(results))
            print(f"{row}  {time.perf_counter() - started:.1f} s", flush=True)
        return [f"{r['phase']} S{r['S']} B{r['B']}: {name}: {why}" for r in results for name, why in r["wrong"].items()]


def machine(nvcc_version: str) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "device": gpu.name, "memory_bytes": gpu.total_memory, "cache_bytes": gpu.L2_cache_size,
        "multiprocessors": gpu.multi_processor_count, "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda, "nvcc": nvcc_version, "torch": torch.__version__, "triton": installed("triton"),
        "python": platform.python_version(), "processors": os.cpu_count(), "smi": smi(),
    }  # fmt: skip


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def smi() -> dict[str, str] | None:
    """Driver, clocks and temperature, where nvidia-smi tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run([tool, f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return dict(zip(QUERY.split(","), lines[0].split(", "), strict=False)) if done.returncode == 0 and lines else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
