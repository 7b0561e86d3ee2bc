"""What validation found, for machines (JSON, JUnit), for a browser (one HTML file without links) and for a terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from fope_export import plots
from fope_export.backends.choose import Machine, read_machine
from fope_export.bundle import MODEL, REPORTS, Bundle, judged_files
from fope_export.config import ModelConfig
from fope_export.lock import TIMEOUT
from fope_export.parity.judge import FLOOR, METRICS
from fope_export.parity.run import CaseResult, ParityResult

PAGE, JUNIT = "parity.html", "parity.xml"
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


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def parity_files(bundle: Bundle, result: ParityResult) -> dict[str, bytes]:
    """The reports by name: parity.json, parity.html and parity.xml."""
    record = parity_record(bundle, result)
    return {
        "parity.json": msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n",
        PAGE: parity_page(bundle, result).encode(),
        JUNIT: parity_junit(bundle, result),
    }


def parity_record(bundle: Bundle, result: ParityResult) -> dict[str, Any]:
    """Everything, as plain data. Infinite errors become null."""
    manifest = bundle.manifest
    cases = [
        {
            "name": case.name,
            "passed": case.verdict.passed,
            "failed": case.verdict.failed,
            "tokens": case.length,
            "positions": case.positions,
            "steps": case.steps,
            "compared": case.compared,
            "error": msgspec.to_builtins(case.verdict.got),
            "pytorch_error": msgspec.to_builtins(case.verdict.noise),
            "limits": case.verdict.limits,
        }
        for case in result.cases
    ]
    controls = [
        {
            "name": control.name,
            "passed": control.passed,
            "skipped": control.skipped or None,
            "refused_by": control.verdict.failed if control.verdict else [],
            "error": msgspec.to_builtins(control.verdict.got) if control.verdict else None,
        }
        for control in result.controls
    ]
    return {
        "passed": result.passed,
        "backend": result.backend,
        "model_sha256": manifest.files.get(MODEL),
        "files": judged_files(manifest),
        "source": manifest.source,
        "dtype": manifest.export.dtype,
        "training_length": trained_at(bundle),
        "rule": {
            "factor": result.factor,
            "floor": FLOOR,
            "truth": "PyTorch float64",
            "noise": f"PyTorch {result.dtype}",
        },
        "cases": cases,
        "controls": controls,
        "quantisation": _cost_record(result),
        "extension": msgspec.to_builtins(result.reach),
        "damaged_files": result.damaged,
        "broken": result.broken or None,
        "place": msgspec.to_builtins(result.place),
        "tool_version": manifest.tool_version,
        "machine": msgspec.to_builtins(read_machine()),
    }


def parity_page(bundle: Bundle, result: ParityResult) -> str:
    """One HTML file that opens offline."""
    return render(
        "parity.html",
        bundle=bundle,
        result=result,
        figure=plots.as_svg(plots.error_figure(result, trained_at(bundle))) if result.cases else "",
        labels=LABELS,
        machine=read_machine(),
        place=place(result),
        cost=cost_line(result),
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


def of_module(result: ParityResult) -> bool:
    """Whether it is about a module: its cases have no positions."""
    return any(case.positions is None for case in result.cases)


def render(template: str, **context: Any) -> str:
    """A page from the package's templates; a name that a template misses is an error."""
    environment = Environment(loader=PackageLoader("fope_export"), autoescape=True, undefined=StrictUndefined)
    environment.filters["short"] = short
    environment.filters["machine"] = machine_line
    return environment.get_template(template).render(context)


def short(value: float) -> str:
    """A number in a table: counts as they are, others with two digits."""
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def machine_line(machine: Machine) -> str:
    """The machine in one line."""
    packages = ", ".join(f"{name} {found}" for name, found in machine.packages.items())
    return f"{machine.system}, {machine.cores} cores, Python {machine.python}; {packages}"


def parity_junit(bundle: Bundle, result: ParityResult) -> bytes:
    """JUnit XML: a test case for each comparison, each control, and the files."""
    checks = [(f"case: {c.name}", "" if c.verdict.passed else _why(c)) for c in result.cases]
    checks += [(f"control: {c.name}", "" if c.passed else "a wrong model passed") for c in result.controls]
    if result.cost:
        checks += [(f"quantisation: {result.cost.kind}", "; ".join(result.cost.failed))]
    checks += [("backend", result.broken)]
    checks += [("files", "; ".join(f"{name} {reason}" for name, reason in result.damaged.items()))]
    failures = sum(bool(reason) for _, reason in checks)
    counts = {"tests": str(len(checks)), "failures": str(failures)}
    suite = Xml.Element("testsuite", {"name": f"parity {bundle.path.name}"} | counts)
    for name, reason in checks:
        case = Xml.SubElement(suite, "testcase", classname="fope_export.parity", name=name)
        if reason:
            Xml.SubElement(case, "failure", message=reason).text = place(result)
    Xml.indent(suite)
    return bytes(Xml.tostring(suite, encoding="utf-8", xml_declaration=True))


def _why(case: CaseResult) -> str:
    got, limits = case.verdict.got, case.verdict.limits
    return "; ".join(f"{LABELS[n]} {short(getattr(got, n))} > {short(limits[n])}" for n in case.verdict.failed)


def _cost_record(result: ParityResult) -> dict[str, Any] | None:
    if (cost := result.cost) is None:
        return None
    known: dict[str, Any] = msgspec.to_builtins(cost)
    return known | {"growth": cost.growth, "limit": cost.limit, "passed": not cost.failed, "failed": cost.failed}


def cost_line(result: ParityResult) -> str:
    """What quantisation costs, in words; empty where there is none."""
    if (cost := result.cost) is None:
        return ""
    kl = f"mean KL divergence {short(cost.kl)} nats"
    if cost.growth is None:
        return f"{cost.what}: {kl} on {cost.tokens:,} random tokens"
    return (
        f"{cost.what}: perplexity {cost.perplexity:.4f} becomes {cost.quantised:.4f} ({cost.growth:+.2%}, "
        f"allowed {cost.limit:+.1%}), {kl}, on {cost.tokens:,} bytes of held-out Python"
    )


def place(result: ParityResult) -> str:
    """Where a failed bundle first differs, in words; empty for one that passed."""
    if (found := result.place) is None:
        return ""
    parts = [result.broken] if result.broken else []
    if (first := found.divergence) is not None:
        parts.append(
            f"First module that diverges: {first.module} (error {first.error:.2g}, allowed {first.allowed:.2g})."
        )
    for what, names in (
        ("Tensors that differ from the checkpoint", found.tensors),
        ("Rotations with other settings", found.rotations),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{what}: {names[0]}{others}.")
    if not parts and not all(case.verdict.passed for case in result.cases):
        where = "between them" if of_module(result) else "in how the graph uses its cache"
        parts.append(f"On whole sequences every module agrees: the fault lies {where}.")
    return " ".join(parts)


def parity_table(result: ParityResult) -> Table:
    """The comparisons for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    size = "size" if of_module(result) else "tokens"
    columns = ("case", size, "largest error", "allowed", "x PyTorch's", "KL", LABELS["flips"], "")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "") else "right", no_wrap=column == "case")
    for case in result.cases:
        got, verdict = case.verdict.got, case.verdict
        table.add_row(
            case.name, str(case.length), short(got.max_abs), short(verdict.limits["max_abs"]), f"{verdict.ratio:.2f}",
            short(got.kl), str(got.flips), "[green]pass[/]" if verdict.passed else f"[red]FAIL[/] {_why(case)}",
        )  # fmt: skip
    for control in result.controls:
        if control.verdict is None:
            table.add_row(f"control: {control.name}", *[""] * 6, f"[dim]not possible: {control.skipped}[/]")
        else:
            got, verdict = control.verdict.got, control.verdict
            table.add_row(
                f"control: {control.name}", "", short(got.max_abs), short(verdict.limits["max_abs"]),
                f"{verdict.ratio:,.0f}", short(got.kl), str(got.flips),
                "[green]refused[/]" if control.passed else "[red]NOT REFUSED: the check is broken[/]",
            )  # fmt: skip
    return table


def print_parity(result: ParityResult, console: Console) -> None:
    """Table, place and verdict."""
    console.print(parity_table(result))
    if result.cost:
        failed = "; ".join(result.cost.failed)
        console.print(f"{cost_line(result)}: " + (f"[red]FAIL[/] {failed}" if failed else "[green]pass[/]"))
    if line := reach_line(result):
        console.print(line)
    for name, reason in result.damaged.items():
        console.print(f"[red]FAIL[/] {name} {reason}")
    if found := place(result):
        console.print(found, markup=False, style="red")
    console.print("[bold green]passed[/]" if result.passed else "[bold red]FAILED[/]")


assert set(LABELS) == set(METRICS)
