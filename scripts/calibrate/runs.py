"""A run: the verdict over all cases, and over the deliberate mistakes, of one plain validation of one file."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calibrate import today
from calibrate.models import KINDS, Recipe, bundle_of, pool
from calibrate.records import Book, Record
from fope_export.backends.base import Backend, Feeds
from fope_export.backends.choose import BACKENDS, Settings
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.errors import FopeError
from fope_export.model.checkpoint import source_of
from fope_export.model.decoder import DTYPES
from fope_export.parity.cases import Case, prefill, standard_cases
from fope_export.parity.controls import CONTROLS
from fope_export.parity.judge import ColumnVerdict, Verdict, judge_columns
from fope_export.parity.results import CaseResult
from fope_export.parity.run import SHORTEST_CONTROL, _files, _quantize, _refusals, _round, yardstick_of
from fope_export.parity.sparing import SparingYardstick

BACKEND = "onnxruntime"
FILES = ("portable", "optimized")
PASSES = ((("float32", 0), (None, 0)), (("float32", 0), (None, 0)), ((None, 1),), ((None, 2),), ((None, 1), (None, 2)))
"""What each pass over the models judges: a kind, or one of the model's own three. The first passes see every model, so
that a result cut short is about all of them.
"""
SEEDS = (range(3), range(3, 6), range(3), range(3), range(3, 6))
THREADS = (1, 1, 2)
"""By seed. Two are many times slower than one while another program wants the processor."""
FITTED = 1
"""Passes that are enough to fix limits by."""


@dataclass(frozen=True)
class Run:
    """Both files of a bundle on the same cases."""

    model: Recipe | str
    kind: str
    seed: int
    threads: int

    @property
    def name(self) -> str:
        return self.model if isinstance(self.model, str) else self.model.name

    @property
    def key(self) -> tuple[str, str, int]:
        return self.name, self.kind, self.seed


def planned(role: str) -> list[Run]:
    """All runs of a role, in their order."""
    passes = range(FITTED if role == "fit" else len(PASSES))
    return [run for step in passes for seed in SEEDS[step] for run in _round_of(role, step, seed)]


def _round_of(role: str, step: int, seed: int) -> Iterator[Run]:
    """Every model once in each kind of a pass; the shipped ones, which are long, and the large ones in fewer."""
    others = [kind for kind in KINDS if kind != "float32"]
    for number, model in enumerate(pool(role)):
        for kind, place in PASSES[step] if seed < _seeds(model) else ():
            yield Run(model, kind or others[(number + 2 * place) % len(others)], seed, THREADS[seed % len(THREADS)])


def _seeds(model: Recipe | str) -> int:
    """Those that are wanted of a model."""
    if isinstance(model, str):
        return SEEDS[0].stop
    return 1 if model.lengths else SEEDS[-1].stop


@dataclass
class Bench:
    """A bundle, what it is held against, and how: as `validate` sets it up."""

    bundle: Bundle
    yardstick: SparingYardstick
    plain: SparingYardstick
    """The same; where inputs of linear layers are rounded, without that."""
    cases: list[Case]
    reference: Case
    files: dict[str, Backend]
    rounded: list[CaseResult]
    former: EagerBackend
    """PyTorch in the bundle's own dtype, whose error was the yardstick once."""

    @classmethod
    def of(cls, bundle: Bundle, lengths: Sequence[int], seed: int, threads: int) -> "Bench":
        torch.set_num_threads(threads)
        exported, config = bundle.manifest.export, bundle.manifest.decoder()
        plain = yardstick_of(bundle, source_of(bundle).model.converted(exported), BACKEND)
        if exported.quantize:
            _quantize(plain, bundle)
        cases = standard_cases(config, seed, lengths, BACKENDS[BACKEND].limits(bundle))
        reference = prefill(config, max(config.training_length, SHORTEST_CONTROL), seed)
        loading = _files(bundle, BACKEND, Settings(threads=threads)).values()
        rounded: list[CaseResult] = []
        yardstick = plain
        if exported.calibrated:
            rounded, yardstick = _round(plain, bundle, BACKEND, reference)
        former = EagerBackend(yardstick.single.model)
        if exported.dtype == "bf16":
            former = EagerBackend(plain.single.model.sharing().to(DTYPES["bf16"]))
        files = dict(zip(FILES, (load() for load in loading), strict=True))
        return cls(bundle, yardstick, plain, cases, reference, files, rounded, former)

    def columns(self, verdicts: Sequence[Verdict]) -> ColumnVerdict:
        """Of one file's cases."""
        return judge_columns(verdicts, lambda: [self.yardstick.look(case).again() for case in self.cases])

    def missed(self) -> list[str]:
        """The deliberate mistakes that are not refused, which fails a validation too."""
        results = _refusals(CONTROLS, self.reference, self.plain, self.plain.look(self.reference))
        return [control.name for control in results if not control.passed]


@dataclass
class Judged:
    """What one file gave in all cases."""

    verdicts: list[tuple[str, Verdict]]
    former: list[dict[str, float]]

    def record(self, columns: ColumnVerdict, rounded: Sequence[CaseResult]) -> Record:
        """The largest of each ratio, which cases miss a limit, and the same by the former rule."""
        every = [*self.verdicts, *((each.name, each.verdict) for each in rounded)]
        names = every[0][1].ratios
        ratios = {name: max(verdict.ratios[name] for _, verdict in every) for name in names} | {"column": columns.ratio}
        failed = [f"{name}: {', '.join(verdict.failed)}" for name, verdict in every if not verdict.passed]
        failed += [] if columns.passed else [f"column {columns.logit}"]
        former = {name: max(each[name] for each in self.former) for name in self.former[0]}
        members = max(verdict.members for _, verdict in every)
        return {
            "ratios": _short(ratios),
            "failed": failed,
            "members": max(members, columns.members),
            "former": _short(former),
        }


def as_formerly(case: Case) -> Case:
    """As the former rule had it: one row of a prefill."""
    if not case.name.startswith("prefill"):
        return case
    return replace(case, feeds=Feeds(*(array[:1] for array in case.feeds)))


def _short(numbers: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{number:.3g}") for name, number in numbers.items()}


def run(asked: Run, work: Path) -> Iterator[Record]:
    """A record for each file; the deliberate mistakes that are not refused stand in the first."""
    lengths = asked.model.lengths if isinstance(asked.model, Recipe) else ()
    bench = Bench.of(bundle_of(asked.model, asked.kind, work), lengths, asked.seed, asked.threads)
    judged = {name: Judged([], []) for name in bench.files}
    allowance = bench.yardstick.allowance
    for case in bench.cases:
        look, alone = bench.yardstick.look(case), as_formerly(case)
        noisy = alone.run(bench.former)
        truth = look.truth[: len(noisy)]
        for name, backend in bench.files.items():
            judged[name].verdicts.append((case.name, look.judge(case.run(backend))))
            judged[name].former.append(today.shares(truth, noisy, alone.run(backend), allowance))
    missed = bench.missed()
    for name, each in judged.items():
        first = name == FILES[0]
        record = each.record(bench.columns([verdict for _, verdict in each.verdicts]), bench.rounded if first else ())
        yield {"file": name} | record | ({"missed": missed} if first else {})


def judge_all(role: str, book: Book, work: Path, until: float, part: tuple[int, int] = (1, 1)) -> None:
    """Add the runs that the book lacks, in their order, until the clock says so. Of `part` (i, n) only every n-th
    model's are this process's.
    """
    instructions = book.sitting["machine"]["instructions"]
    known = Counter(
        tuple(line["run"][:3]) for line in book.records() if "run" in line and line["instructions"] == instructions
    )
    mine = [model for number, model in enumerate(pool(role)) if number % part[1] == part[0] - 1]
    for asked in planned(role):
        if time.monotonic() >= until:
            return
        if asked.model in mine and known[asked.key] < len(FILES):
            _add(asked, role, book, work)


def _add(asked: Run, role: str, book: Book, work: Path) -> None:
    started = time.process_time()
    try:
        lines = list(run(asked, work))
    except FopeError as error:  # PyTorch itself overflows, or there is no such file: there is nothing to judge
        lines = [{"file": name, "skipped": str(error)} for name in FILES]
    common = {"role": role, "run": [*asked.key, asked.threads]}
    for record in lines:
        book.add(common | record | {"seconds": round(time.process_time() - started, 1)})
