"""Reports that were written before: two of a kind beside each other, or one as Markdown for the page of a CI job."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

from fope_export.documents import as_record, read_object
from fope_export.errors import ConfigError, cut

HINT = "Give parity.json, bench.json or evaluation.json, or a folder or bundle that has one."


class ParityCase(msgspec.Struct):
    """Errors in units of rounding by how they are taken; null where they are infinite."""

    name: str
    ratios: dict[str, float | None]


class ParityReport(msgspec.Struct):
    """What `validate` writes, as far as it is read here."""

    passed: bool
    failures: list[str]
    cases: list[ParityCase]
    backend: str

    def numbers(self) -> Iterator[tuple[str, float | None]]:
        """The error of each case in units of rounding."""
        for case in self.cases:
            yield f"{case.name}, error / rounding", case.ratios.get("rms")


class BenchCell(msgspec.Struct):
    """One contender at one size; the speeds are absent where it was not timed."""

    contender: str
    length: int
    batch: int
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


class BenchReport(msgspec.Struct):
    """What `bench` writes."""

    cells: list[BenchCell]

    def numbers(self) -> Iterator[tuple[str, float | None]]:
        """Tokens a second."""
        for cell in self.cells:
            where = f"{cell.contender}, {cell.batch} x {cell.length}"
            yield f"{where}, prefill /s", cell.prefill_tokens_per_s
            yield f"{where}, decode /s", cell.decode_tokens_per_s


class Evaluated(msgspec.Struct):
    """A model, by length of context."""

    name: str
    losses: dict[str, float]
    passkey_accuracy: dict[str, float]


class EvaluationReport(msgspec.Struct):
    """What `evaluate` writes."""

    models: list[Evaluated]

    def numbers(self) -> Iterator[tuple[str, float | None]]:
        """Losses in nats, and the share of passkeys that were found."""
        for model in self.models:
            for what, values in (("loss", model.losses), ("passkeys", model.passkey_accuracy)):
                yield from ((f"{model.name}, {what} at {length}", value) for length, value in values.items())


Report: TypeAlias = ParityReport | BenchReport | EvaluationReport
KINDS: dict[str, type[Report]] = {
    "parity.json": ParityReport, "bench.json": BenchReport, "evaluation.json": EvaluationReport,
}  # fmt: skip
"""What is looked for in a folder, in this order."""


class Row(NamedTuple):
    """One number of two reports; None where one lacks it."""

    what: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """The second over the first."""
        return self.after / self.before if self.before and self.after is not None else None


def read(path: Path) -> Report:
    """The report in a file, or the first of KINDS in a folder or among a bundle's. Raises ConfigError for none."""
    found = [path]
    if path.is_dir():
        found = [file for name in KINDS for folder in (path, path / "reports") if (file := folder / name).is_file()]
    if not found:
        raise ConfigError(f"{path} has no report", hint=HINT)
    document = read_object(found[0], raises=ConfigError, hint=HINT)
    for kind in KINDS.values():
        if set(kind.__struct_fields__) <= document.keys():
            return as_record(document, kind, str(found[0]), raises=ConfigError)
    raise ConfigError(f"{found[0]} is no report of this program: {cut(', '.join(document))}", hint=HINT)


def compare(before: Report, after: Report) -> list[Row]:
    """The numbers of two reports, in the order of the first. Raises ConfigError for two kinds."""
    if type(before) is not type(after):
        raise ConfigError(f"{type(before).__name__} and {type(after).__name__} have nothing in common", hint=HINT)
    left, right = dict(before.numbers()), dict(after.numbers())
    return [Row(name, left.get(name), right.get(name)) for name in left | right]


def markdown(report: Report, title: str) -> str:
    """A heading with the verdict, and a table."""
    lines = [f"### {title}", ""]
    if isinstance(report, ParityReport):
        lines = [f"### {title}: {'passed' if report.passed else 'FAILED'}", "", *(f"- {x}" for x in report.failures)]
    lines += ["", "| | |", "|---|---:|"]
    lines += [f"| {what} | {told(number)} |" for what, number in report.numbers()]
    return "\n".join(lines)


def told(number: float | None) -> str:
    """A number in a table: nothing where there is none."""
    return "" if number is None else f"{number:,.4g}"
