"""What a validation layer by layer found, for machines (JSON) and for a terminal."""

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from fope_export.backends.machine import read_machine
from fope_export.bundle import Bundle
from fope_export.manifest import REPORTS, judged_files
from fope_export.parity.localize import LIMITS
from fope_export.parity.stages import Error, StagesResult
from fope_export.records import StagesRecord

FILE = "stages.json"


def stages_record(bundle: Bundle, result: StagesResult) -> StagesRecord:
    """Everything, as plain data."""
    return {
        "passed": result.passed,
        "failures": result.failures,
        "files": judged_files(bundle.manifest),
        "source": bundle.manifest.source,
        "dtype": bundle.manifest.export.dtype,
        "rule": {"limits": LIMITS, "truth": "PyTorch float64", "noise": f"PyTorch {result.dtype}"},
        "stages": result.stages,
        "damaged_files": result.damaged,
        "tool_version": bundle.manifest.tool_version,
        "machine": read_machine(),
    }


def write_stages(bundle: Bundle, result: StagesResult, out: Path | None, *, lock_timeout: float) -> Path:
    """Put the report into folder `out`, or into the bundle; its path. Raises as `Bundle.add`."""
    content = msgspec.json.format(msgspec.json.encode(stages_record(bundle, result)), indent=2) + b"\n"
    if out is None:
        bundle.add({f"{REPORTS}{FILE}": content}, lock_timeout=lock_timeout)
        return bundle.path / REPORTS / FILE
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_bytes(content)
    return out / FILE


def print_stages(result: StagesResult, console: Console) -> None:
    """A line for each stage, and the verdict."""
    told = ("error", f"PyTorch {result.dtype}", "all tokens", "worst token")
    table = Table("stage", *told, "accumulated", *told[1:], "", box=None)
    for stage in result.stages:
        verdict = "[green]pass[/]" if stage.passed else "[red]FAIL[/]"
        table.add_row(stage.name, *_told(stage.own), *_told(stage.accumulated), verdict)
    console.print(table)
    for failure in result.failures:
        console.print(failure, markup=False, style="red")
    console.print("[bold green]passed[/]" if result.passed else "[bold red]FAILED[/]")


def _told(error: Error) -> list[str]:
    """Relative errors, and ratios to rounding."""
    return [f"{error.relative:.1e}", f"{error.pytorch:.1e}", *(f"{error.ratios[name]:.2f}" for name in LIMITS)]
