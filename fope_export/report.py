"""What validation found, for machines (JSON, JUnit), for a browser (one HTML file without links) and for a terminal."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from fope_export import plots
from fope_export.backends.machine import Machine, read_machine
from fope_export.bundle import Bundle
from fope_export.config import ModelConfig
from fope_export.lock import TIMEOUT
from fope_export.manifest import MODEL, REPORTS, judged_files
from fope_export.parity.judge import LIMITS, MEMBERS, METRICS, MORE, Measure, Verdict
from fope_export.parity.quantized import Cost
from fope_export.parity.results import MODULE_RATIOS, RATIOS, CaseResult, ColumnResult, ControlResult, ParityResult, why
from fope_export.records import CaseRecord, ColumnRecord, ControlRecord, CostRecord, Errors, ParityRecord
from fope_export.validated import REPORT

PAGE, JUNIT = "parity.html", "parity.xml"
UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to write: control characters, lone surrogates, two that are no characters."""
LABELS = {
    "max_abs": "largest error",
    "relative": "relative error",
    "cosine": "1 - cosine",
    "kl": "KL divergence",
    "flips": "other argmax",
    "non_finite": "not finite",
}


def write_parity(bundle: Bundle, result: ParityResult, *, lock_timeout: float = TIMEOUT) -> Bundle:
    """Put `reports/parity.json`, `.html` and `.xml` into the bundle. Raises BundleError and OSError as `Bundle.add`."""
    files = parity_files(bundle, result)
    return bundle.add({f"{REPORTS}{name}": content for name, content in files.items()}, lock_timeout=lock_timeout)


def write_reports(
    bundle: Bundle, result: ParityResult, out: Path | None = None, junit: Path | None = None, *, lock_timeout: float
) -> Iterator[Path | OSError]:
    """Put the reports into folder `out`, or into the bundle, and the JUnit file to `junit` too: gives the page's path
    and the file's, or why it could not be written. Raises BundleError as `Bundle.add`.
    """
    files = parity_files(bundle, result)
    try:
        if out is None:
            write_parity(bundle, result, lock_timeout=lock_timeout)
        else:
            for name, content in files.items():
                _write(out / name, content)
        yield (out or bundle.path / REPORTS) / PAGE
    except OSError as cause:
        yield cause
    if junit:
        try:
            _write(junit, files[JUNIT])
            yield junit
        except OSError as cause:
            yield cause


def write(bundle: Bundle, files: dict[str, bytes], page: str, out: Path | None, *, lock_timeout: float) -> Path:
    """Put files into folder `out`, or among the bundle's reports: the path of one of them, `page`. Raises BundleError
    and OSError as `Bundle.add`.
    """
    if out is None:
        bundle.add({f"{REPORTS}{name}": content for name, content in files.items()}, lock_timeout=lock_timeout)
        return bundle.path / REPORTS / page
    for name, content in files.items():
        _write(out / name, content)
    return out / page


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def parity_files(bundle: Bundle, result: ParityResult) -> dict[str, bytes]:
    """The reports by name: parity.json, parity.html and parity.xml."""
    record = parity_record(bundle, result)
    return {
        REPORT: msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n",
        PAGE: parity_page(bundle, result).encode(),
        JUNIT: parity_junit(bundle, result),
    }


def parity_record(bundle: Bundle, result: ParityResult) -> ParityRecord:
    """Everything, as plain data. Infinite errors become null."""
    manifest = bundle.manifest
    return {
        "passed": result.passed,
        "failures": [encodable(each) for each in result.failures],
        "backend": result.backend,
        "model_sha256": manifest.files.get(MODEL),
        "files": judged_files(manifest),
        "tested": result.tested,
        "source": manifest.source,
        "dtype": manifest.export.dtype,
        "training_length": trained_at(bundle),
        "rule": {
            "limits": LIMITS,
            "allowance": result.allowance,
            "truth": "PyTorch float64",
            "noise": f"PyTorch {result.dtype}, one weight in eight moved by one unit in the last place",
        },
        "cases": [_case_record(case) for case in result.cases],
        "columns": [_column_record(each) for each in result.columns],
        "controls": [_control_record(control) for control in result.controls],
        "quantization": _cost_record(result.cost) if result.cost else None,
        "caches": [_cost_record(each) for each in result.caches],
        "extension": result.reach,
        "damaged_files": result.damaged,
        "broken": encodable(result.broken) or None,
        "place": result.place,
        "date": now().isoformat(),
        "seconds": round(result.seconds, 1),
        "tool_version": manifest.tool_version,
        "machine": read_machine(),
    }


def _case_record(case: CaseResult) -> CaseRecord:
    return {
        "name": case.name,
        "passed": case.verdict.passed,
        "failed": case.verdict.failed,
        "tokens": case.length,
        "positions": case.positions,
        "steps": case.steps,
        "compared": case.compared,
        "seconds": round(case.seconds, 4),
        "ratios": dict(case.verdict.ratios),
        "limits": case.verdict.limits,
        "members": case.verdict.members,
        "error": _errors(case.verdict.got),
        "pytorch_error": _errors(case.own),
    }


def _column_record(column: ColumnResult) -> ColumnRecord:
    known = msgspec.to_builtins(column.verdict) | {"name": column.name, "passed": column.verdict.passed}
    return msgspec.convert(known, ColumnRecord)


def _control_record(control: ControlResult) -> ControlRecord:
    return {
        "name": control.name,
        "passed": control.passed,
        "skipped": control.skipped or None,
        "refused_by": control.verdict.failed if control.verdict else (),
        "ratios": dict(control.verdict.ratios) if control.verdict else None,
        "error": _errors(control.verdict.got) if control.verdict else None,
    }


def _errors(measure: Measure) -> Errors:
    return msgspec.convert(msgspec.to_builtins(measure), Errors)


def parity_page(bundle: Bundle, result: ParityResult) -> str:
    """One HTML file that opens offline."""
    return render(
        "parity.html",
        bundle=bundle,
        result=result,
        figure=plots.as_svg(plots.error_figure(result, trained_at(bundle))) if result.cases else "",
        labels=LABELS,
        ratios=result.ratio_labels,
        limits=LIMITS,
        members=MEMBERS,
        more=MORE,
        machine=read_machine(),
        place=place(result),
        cost=cost_line(result.cost),
        caches=[(cost_line(each), each.failed) for each in result.caches],
        reach=_reach_figure(bundle, result),
    )


def _reach_figure(bundle: Bundle, result: ParityResult) -> str:
    if result.reach is None:
        return ""
    losses = {
        "as trained": result.reach.before,
        bundle.manifest.export.described.rpartition(", ")[2]: result.reach.after,
    }
    return plots.as_svg(plots.loss_figure(losses, bundle.manifest.decoder().training_length))


def reach_line(result: ParityResult) -> str:
    """What extending did, in words; empty where nothing was extended or there is no text to measure it on."""
    if result.reach is None:
        return ""
    pairs = (
        f"{length}: {before:.3f} → {result.reach.after[length]:.3f}" for length, before in result.reach.before.items()
    )
    return f"loss by length of context, before and after extending, nats per byte: {', '.join(pairs)}"


def trained_at(bundle: Bundle) -> int | None:
    """The training length; nothing for a module, which says nothing about it."""
    model = bundle.manifest.model
    return model.training_length if isinstance(model, ModelConfig) else None


def render(template: str, **context: Any) -> str:
    """A page from the package's templates; a name that a template misses is an error."""
    environment = Environment(loader=PackageLoader("fope_export"), autoescape=True, undefined=StrictUndefined)
    environment.filters["short"] = short
    environment.filters["times"] = times
    environment.filters["machine"] = machine_line
    return encodable(environment.get_template(template).render(context, date=f"{now():%d %B %Y, %H:%M} UTC"))


def now() -> datetime:
    """When a report is made."""
    return datetime.now(UTC).replace(microsecond=0)


def encodable(text: str) -> str:
    """Text with \\ud800 in the place of lone surrogates, which a path may hold and no encoding does."""
    return text.encode(errors="backslashreplace").decode()


def short(value: float) -> str:
    """A number in a table: counts as they are, others with two digits."""
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def times(ratio: float) -> str:
    """A multiple, with two digits after the point where they mean something."""
    return f"{ratio:,.2f}" if ratio < 100 else f"{ratio:,.0f}"


def machine_line(machine: Machine) -> str:
    """The machine in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    return f"{machine.system}, {machine.cores} cores, Python {machine.python}; {packages}"


def writable(text: str) -> str:
    """Text with \\x1b and \\ud800 in the place of characters that XML 1.0 has no way to write."""
    return UNWRITABLE.sub(lambda character: character[0].encode("unicode_escape").decode(), text)


def parity_junit(bundle: Bundle, result: ParityResult) -> bytes:
    """JUnit XML: a test case for each comparison, with the seconds that the bundle ran for it, each control, and the
    files; the suite's time is that of the whole validation.
    """
    checks = result.checks
    name, counts = writable(bundle.path.name), {"tests": str(len(checks)), "failures": str(len(result.failures))}
    when = {"timestamp": f"{now():%Y-%m-%dT%H:%M:%S}", "time": f"{result.seconds:.1f}"}
    suite = Xml.Element("testsuite", {"name": f"parity {name}"} | counts | when)
    for check in checks:
        called = {"classname": f"fope_export.parity.{name}", "name": writable(check.name)}
        case = Xml.SubElement(suite, "testcase", called, time=f"{check.seconds:.3f}")
        if check.reason:
            Xml.SubElement(case, "failure", message=writable(check.reason)).text = writable(place(result))
    Xml.indent(suite)
    return bytes(Xml.tostring(suite, encoding="utf-8", xml_declaration=True))


def _cost_record(cost: Cost) -> CostRecord:
    more = {"growth": cost.growth, "limit": cost.limit, "passed": not cost.failed, "failed": cost.failed}
    return msgspec.convert(msgspec.to_builtins(cost) | more, CostRecord)


def cost_line(cost: Cost | None) -> str:
    """What rounding costs, in words; empty where there is none."""
    if cost is None:
        return ""
    kl = f"mean KL divergence {short(cost.kl)} nats"
    if cost.growth is None:
        return f"{cost.what}: {kl} on {cost.tokens:,} random tokens"
    return (
        f"{cost.what}: perplexity {cost.perplexity:.4f} becomes {cost.quantized:.4f} ({cost.growth:+.2%}, "
        f"allowed {cost.limit:+.1%}), {kl}, on {cost.tokens:,} bytes of held-out Python"
    )


def place(result: ParityResult) -> str:
    """Where a failed bundle first differs, in words; empty for one that passed."""
    if (where := result.place) is None:
        return ""
    parts = [result.broken] if result.broken else []
    if (first := where.divergence) is not None:
        parts.append(
            f"First module that diverges: {first.module} "
            f"({result.ratio_labels[first.ratio]} {short(first.error)} times rounding, allowed {first.allowed:g})."
        )
    for what, names in (
        ("Tensors that differ from the checkpoint", where.tensors),
        ("Rotations with other settings", where.rotations),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{what}: {names[0]}{others}.")
    return " ".join(parts) or _without_place(result)


def _without_place(result: ParityResult) -> str:
    """What is known where no module stands out."""
    failed = [case for case in result.cases if not case.verdict.passed]
    if not failed and all(each.verdict.passed for each in result.columns):
        return ""
    agree = "On whole sequences every module of model.onnx is as close to float64 as rounding explains"
    if failed and all(case.name.endswith(", optimized") for case in failed):
        return f"{agree}: the fault lies in the optimized file."
    if failed and all(", cache rounded" in case.name for case in failed):
        return f"{agree}: the fault lies in how keys and values are rounded."
    if failed and all(case.steps > 1 for case in failed):
        return f"{agree}: the fault lies in how the graph uses its cache."
    return f"{agree}: no layer can be named."


def parity_table(result: ParityResult) -> Table:
    """The comparisons for a terminal of 80 columns: errors in units of rounding. The page has the plain ones too."""
    size, labels = "size" if result.ratio_labels is MODULE_RATIOS else "tokens", result.ratio_labels
    table = _table("case", size, *labels.values(), "")
    for case in result.cases:
        table.add_row(case.name, f"{case.length:,}", *_ratios(case.verdict), _said(why(case.verdict, labels)))
    for each in result.columns:
        ratio, reason = times(each.verdict.ratio), why(each.verdict, labels)
        table.add_row(each.name, *[""] * len(RATIOS), ratio, _said(reason))
    return table


def controls_table(result: ParityResult) -> Table:
    """Models that are wrong on purpose, and how far from what is allowed."""
    table = _table("wrong on purpose", "x rounding", "")
    for control in result.controls:
        if control.verdict is None:
            table.add_row(control.name, "", f"[dim]not possible: {control.skipped}[/]")
        else:
            outcome = "[green]refused[/]" if control.passed else "[red]NOT REFUSED: the check is broken[/]"
            table.add_row(control.name, times(control.verdict.ratio), outcome)
    return table


def _table(*columns: str) -> Table:
    """Of names on the left, numbers, and a verdict that may be long."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in (0, len(columns) - 1) else "right", no_wrap=number == 0)
    return table


def _said(why: str) -> str:
    return f"[red]FAIL[/] {why}" if why else "[green]pass[/]"


def _ratios(verdict: Verdict) -> tuple[str, ...]:
    return tuple(times(verdict.ratios[name]) if name in verdict.ratios else "" for name in RATIOS)


def print_parity(result: ParityResult, console: Console) -> None:
    """Tables, place and verdict."""
    console.print(parity_table(result))
    if result.controls:
        console.print(controls_table(result))
    for cost in filter(None, (result.cost, *result.caches)):
        failed = "; ".join(cost.failed)
        console.print(f"{cost_line(cost)}: " + (f"[red]FAIL[/] {failed}" if failed else "[green]pass[/]"))
    if line := reach_line(result):
        console.print(line)
    for name, reason in result.damaged.items():
        console.print(f"[red]FAIL[/] {name} {reason}")
    if where := place(result):
        console.print(where, markup=False, style="red")
    console.print("[bold green]passed[/]" if result.passed else "[bold red]FAILED[/]")


assert set(LABELS) == set(METRICS)
