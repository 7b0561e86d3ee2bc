"""What the benchmark found, for machines (JSON), for a browser and for a terminal."""

import os
import platform
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from fope_export import plots, report
from fope_export.backends.machine import read_machine
from fope_export.benchmark.contenders import CONTENDERS
from fope_export.benchmark.lead import Lead, leads
from fope_export.benchmark.run import BenchResult, Cell, What
from fope_export.bundle import Bundle
from fope_export.config import Positive
from fope_export.documents import as_record, read_object
from fope_export.errors import ConfigError, DocumentError
from fope_export.lock import TIMEOUT
from fope_export.manifest import MODEL
from fope_export.records import BenchMachine, BenchRecord, CellRecord, LeadRecord

COLUMNS = (
    "contender",
    "tokens",
    "first token",
    "prefill",
    "x eager",
    "next token",
    "decode",
    "x eager",
    "bandwidth",
    "memory",
)
SHORT = itemgetter(0, 1, 3, 4, 6, 7, 9)
"""Those that a terminal has room for."""
JSON, PAGE = "bench.json", "bench.html"


class OldCell(msgspec.Struct):
    """What an older record says about a cell, as far as it is compared."""

    contender: str
    length: int
    batch: int
    prefill_tokens_per_s: Positive
    decode_tokens_per_s: Positive


Old = Mapping[tuple[str, int, int], OldCell]
"""Cells of an older record by contender, length and batch."""


def bench_record(bundle: Bundle, result: BenchResult) -> BenchRecord:
    """Everything, as plain data."""
    load = [round(each, 1) for each in os.getloadavg()]
    machine = msgspec.to_builtins(read_machine()) | {"processor": processor(), "load": load}
    return {
        "date": report.now().isoformat(),
        "model_sha256": bundle.manifest.files[MODEL],
        "export": bundle.manifest.export.described,
        "tool_version": bundle.manifest.tool_version,
        "machine": msgspec.convert(machine, BenchMachine),
        "threads": result.threads,
        "bandwidth_GB_per_s": {name: round(each / 1e9, 2) for name, each in result.bandwidth.items()},
        "config": result.config,
        "contenders": result.entries,
        "cells": [_cell_record(result, cell) for cell in result.cells],
        "over_best_peer": [_lead_record(lead) for lead in leads(result, bundle.manifest.export)],
    }


def _lead_record(lead: Lead) -> LeadRecord:
    ends = lead.interval and [round(end, 3) for end in lead.interval]
    return msgspec.convert(lead._asdict() | {"ratio": round(lead.ratio, 3), "interval": ends}, LeadRecord)


def _cell_record(result: BenchResult, cell: Cell) -> CellRecord:
    known: CellRecord = {"contender": cell.contender, "length": cell.length, "batch": cell.batch}
    if cell.refused:
        return {**known, "refused": cell.refused}
    speeds = {what: result.speed(cell, what) for what in ("first", "next")}
    return {
        **known,
        "first_token_ms": round(1e3 * cell.median("first"), 3),
        "prefill_tokens_per_s": round(result.tokens_per_second(cell, "first"), 1),
        "prefill_over_eager": speeds["first"] and round(speeds["first"], 3),
        "next_token_ms": round(1e3 * cell.median("next"), 3),
        "decode_tokens_per_s": round(result.tokens_per_second(cell, "next"), 1),
        "decode_over_eager": speeds["next"] and round(speeds["next"], 3),
        "bandwidth_share": round(result.share(cell), 3),
        "peak_MiB": cell.peak and round(cell.peak / 2**20),
        "warm_up_s": round(cell.warm_up, 2),
        "rounds_ms": {what: [round(1e3 * x, 3) for x in getattr(cell, what)] for what in ("first", "next")},
    }


def bench_page(bundle: Bundle, result: BenchResult) -> str:
    """One HTML file that opens offline."""
    warm_up: dict[str, float] = {}
    for cell in result.cells:
        warm_up[cell.contender] = warm_up.get(cell.contender, 0.0) + cell.warm_up
    return report.render(
        "bench.html",
        bundle=bundle,
        result=result,
        figures={batch: plots.as_svg(plots.speed_figure(result, batch)) for batch in result.config.batch},
        columns=COLUMNS,
        rows={batch: [_row(result, c) for c in result.cells if c.batch == batch] for batch in result.config.batch},
        twins=bool(result.config.peers),
        leads=[str(lead) for lead in leads(result, bundle.manifest.export)],
        warm_up=warm_up,
        processor=processor(),
        machine=read_machine(),
    )


def _row(result: BenchResult, cell: Cell) -> list[str]:
    name = cell.contender + (" *" if CONTENDERS[cell.contender].twin else "")
    start = [name, f"{cell.length:,}"]
    if cell.refused:
        return [*start, "not timed: " + cell.refused, *[""] * (len(COLUMNS) - 3)]
    for what in ("first", "next"):
        speed = result.speed(cell, what)
        times = f"{1e3 * cell.median(what):,.1f} ms", f"{result.tokens_per_second(cell, what):,.0f} /s"
        start += [*times, "" if speed is None else f"{speed:.2f}"]
    return [*start, f"{result.share(cell):.0%}", f"{cell.peak / 2**20:,.0f} MiB" if cell.peak else ""]


def write_bench(bundle: Bundle, result: BenchResult, out: Path | None = None, *, lock_timeout: float = TIMEOUT) -> Path:
    """`bench.json` and `bench.html`, into folder `out` or among the bundle's reports. Returns the page's path."""
    files = {
        JSON: msgspec.json.format(msgspec.json.encode(bench_record(bundle, result)), indent=2) + b"\n",
        PAGE: bench_page(bundle, result).encode(),
    }
    return report.write(bundle, files, PAGE, out, lock_timeout=lock_timeout)


def read_old(path: Path) -> Old:
    """The cells of an older record. Raises ConfigError when it is none."""
    try:
        cells = as_record(read_object(path).get("cells"), list[dict[str, Any]], f"{path}: cells")
        timed = [cell for cell in cells if "refused" not in cell]
        old = as_record(timed, list[OldCell], f"{path}: cells")
    except DocumentError as cause:
        raise ConfigError(f"{path} is not a benchmark's record: {cause}", hint="Give its bench.json.") from cause
    return {(cell.contender, cell.length, cell.batch): cell for cell in old}


def print_bench(bundle: Bundle, result: BenchResult, console: Console, old: Old | None = None) -> None:
    """Tables for a terminal of 80 columns, who leads, and who was not timed, with the reason; speed over an older run's
    where there is one. The page has all COLUMNS.
    """
    for batch in result.config.batch:
        console.print(_short_table(result, batch, old))
    for cell in result.cells:
        if cell.refused:
            console.print(f"not timed: {cell.contender} at {cell.length:,} tokens: {cell.refused}", markup=False)
    console.print("[dim]x eager: speed over eager PyTorch's in the same round, the median; *: on a RoPE twin[/]")
    for lead in leads(result, bundle.manifest.export):
        console.print(str(lead), markup=False)
    for entry in result.entries:
        if entry.refused:
            console.print(f"not timed: {entry.name}: {entry.refused}", markup=False)


def _short_table(result: BenchResult, batch: int, old: Old | None) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = f", {batch} rows" if len(result.config.batch) > 1 else ""
    first, *others = SHORT(COLUMNS)
    for column in (first + rows, *others, *(("prefill / old", "decode / old") if old else ())):
        table.add_column(column, justify="right" if table.columns else "left", overflow="fold")
    for cell in result.cells:
        if cell.batch == batch and not cell.refused:
            table.add_row(*SHORT(_row(result, cell)), *_over_old(result, cell, old or {}))
    return table


def _over_old(result: BenchResult, cell: Cell, old: Old) -> list[str]:
    before = old.get((cell.contender, cell.length, cell.batch))
    if before is None or cell.refused:
        return []
    pairs: tuple[tuple[str, What], ...] = (("prefill_tokens_per_s", "first"), ("decode_tokens_per_s", "next"))
    return [f"{result.tokens_per_second(cell, what) / getattr(before, name):.2f}" for name, what in pairs]


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
