"""What the evaluation found, for machines (JSON), for a browser and for a terminal."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from fope_export import plots, report
from fope_export.backends.machine import read_machine
from fope_export.bundle import Bundle
from fope_export.evaluation import DEPTHS, Evaluation
from fope_export.lock import TIMEOUT
from fope_export.records import EvaluatedRecord, EvaluationRecord

JSON, PAGE = "evaluation.json", "evaluation.html"


def evaluation_record(results: Sequence[Evaluation]) -> EvaluationRecord:
    """Everything, as plain data."""
    return {
        "date": report.now().isoformat(),
        "machine": read_machine(),
        "models": [
            msgspec.convert(msgspec.to_builtins(each) | {"passkey_accuracy": each.accuracy}, EvaluatedRecord)
            for each in results
        ],
    }


def evaluation_page(results: Sequence[Evaluation]) -> str:
    """One HTML file that opens offline."""
    return report.render(
        "evaluation.html",
        results=results,
        figure=plots.as_svg(plots.evaluation_figure(results)),
        depths=DEPTHS,
        cells={each.name: {(cell.length, cell.depth): cell for cell in each.found} for each in results},
        machine=read_machine(),
    )


def write_evaluation(
    bundle: Bundle, results: Sequence[Evaluation], out: Path | None = None, *, lock_timeout: float = TIMEOUT
) -> Path:
    """`evaluation.json` and `evaluation.html`, into folder `out` or among the bundle's reports; the page's path."""
    record = msgspec.json.encode(evaluation_record(results))
    files = {JSON: msgspec.json.format(record, indent=2) + b"\n", PAGE: evaluation_page(results).encode()}
    return report.write(bundle, files, PAGE, out, lock_timeout=lock_timeout)


def print_evaluation(results: Sequence[Evaluation], console: Console) -> None:
    """A line for each model and measure."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    table.add_column("in contexts of")
    for length in results[0].losses:
        table.add_column(f"{length:,}", justify="right")
    for each in results:
        table.add_row(each.name, "loss, nats", *(f"{loss:.3f}" for loss in each.losses.values()))
    for each in results:
        table.add_row(each.name, "passkeys", *(f"{share:.0%}" for share in each.accuracy.values()))
    console.print(table)
