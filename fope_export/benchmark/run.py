"""The benchmark: who may be timed, everybody in turn within every round, ratios within a round."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np

from fope_export.backends.choose import BACKENDS
from fope_export.backends.machine import Machine, read_machine
from fope_export.benchmark.contenders import ALLOWED, CONTENDERS, EAGER, PEERS, TWIN, Job
from fope_export.benchmark.greedy import distance
from fope_export.benchmark.process import Worker
from fope_export.benchmark.rounds import in_turn, ratio
from fope_export.benchmark.twin import write_twin
from fope_export.bundle import Bundle
from fope_export.config import Checked, Count, ModelConfig
from fope_export.dtypes import DTYPES
from fope_export.errors import BackendError, ConfigError, FopeError
from fope_export.model.checkpoint import source_of
from fope_export.scratch import scratch
from fope_export.validated import require_green

CHECKED = 24
"""Tokens of the prompt on which contenders show that they compute the same, and ANSWERED of their answers to it."""
ANSWERED = 12
PAUSE = 0.1
"""Seconds between contenders: a library's threads spin for a while when their work is over."""
What = Literal["first", "next"]
Stage = Callable[[str], None]


class BenchConfig(Checked, frozen=True, kw_only=True):
    """What is measured, and beside what.

    Prompts are of each of `lengths`, in tokens, with each number of rows in `batch`; after each prompt, `decoded`
    tokens are generated. Everybody is timed once in each of `rounds`; and all that again in each of `sittings`, which
    begin with new processes, because a process keeps the memory that it was given, and its luck with it. A contender
    has `threads` threads (None: one for each core). PyTorch runs on `device`. `backends` names those to be timed (none:
    all that this machine can run), `peers` other libraries beside them: "genai", "optimum", "openvino",
    "llamacpp". With `only`, of all these those contenders alone are timed, and eager PyTorch, which judges them.

    Raises ConfigError for names that there are not, and where `lengths` or `batch` is empty.

    >>> import fope_export as fx
    >>> fx.BenchConfig(peers=("abacus",))
    Traceback (most recent call last):
    ...
    fope_export.errors.ConfigError: peers: there is no 'abacus'
    >>> fx.BenchConfig(lengths=(64,), rounds=2).sittings
    1
    """

    lengths: tuple[Count, ...] = (128, 1024)
    batch: tuple[Count, ...] = (1,)
    rounds: Count = 5
    sittings: Count = 1
    decoded: Count = 24
    threads: Count | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "backends": [name for name in BACKENDS if name != EAGER], "peers": PEERS, "only": tuple(CONTENDERS)
        }  # fmt: skip
        for field, names in known.items():
            if strange := set(getattr(self, field)) - set(names):
                raise ConfigError(f"{field}: there is no {min(strange)!r}", hint=f"Of these: {', '.join(names)}.")
        if not self.lengths or not self.batch:
            raise ConfigError("lengths or batch is empty", hint="As --lengths 128,1024 --batch 1.")


@dataclass(frozen=True)
class Entry:
    """A contender, and why it was not timed (or nothing)."""

    name: str
    what: str
    refused: str
    away: float | None = None
    """From eager PyTorch (`greedy.distance`); `allowed` is the limit."""
    allowed: float | None = None
    weight_bytes: int = 0
    """Of weights that one token reads."""
    validated: bool = False
    """Whether the bundle's parity report is about this backend and variant; the others are held to `allowed` alone."""


@dataclass(frozen=True)
class Cell:
    """One contender on prompts [batch, length]: seconds of every round; or why there are none."""

    contender: str
    length: int
    batch: int
    first: tuple[float, ...] = ()
    """To the first token."""
    next: tuple[float, ...] = ()
    """For a token after it, on average."""
    peak: int | None = None
    """Bytes of memory of its process, at the peak."""
    warm_up: float = 0.0
    """Seconds of the first run, which is not counted and compiles what must be compiled."""
    refused: str = ""

    def median(self, what: What) -> float:
        """Seconds."""
        return float(statistics.median(getattr(self, what)))


@dataclass(frozen=True)
class BenchResult:
    """What was measured. Bandwidth is in bytes a second."""

    config: BenchConfig
    threads: int
    bandwidth: dict[str, float]
    entries: tuple[Entry, ...]
    cells: tuple[Cell, ...]
    model: ModelConfig
    cache_width: int
    """Bytes of a number in the cache."""

    def speed(self, cell: Cell, what: What) -> float | None:
        """Eager PyTorch's time over the cell's, the median of the rounds; None where there is none."""
        eager = next(c for c in self.cells if (c.contender, c.length, c.batch) == (EAGER, cell.length, cell.batch))
        if eager.refused or cell.refused:
            return None
        return ratio(getattr(eager, what), getattr(cell, what))

    def tokens_per_second(self, cell: Cell, what: What) -> float:
        """Of the prompt up to the first token, or of decoding; all rows together."""
        tokens = cell.batch * (cell.length if what == "first" else 1)
        return tokens / cell.median(what)

    def share(self, cell: Cell) -> float:
        """Of the measured bandwidth, that decoding needs to read its weights and the cache for every token."""
        entry = next(entry for entry in self.entries if entry.name == cell.contender)
        numbers = 2 * self.model.num_layers * self.model.num_kv_heads * self.model.spectrum.head_dim
        tokens = cell.length + self.config.decoded / 2
        cache = cell.batch * tokens * numbers * self.cache_width
        return (entry.weight_bytes + cache) / cell.median("next") / self.bandwidth["read"]


def bench(
    bundle: str | Path | Bundle,
    config: BenchConfig = BenchConfig(),  # noqa: B008 (it is frozen)
    *,
    checkpoint: Path | None = None,
    adapter: Path | None = None,
    stage: Stage = lambda text: None,
) -> BenchResult:
    """Time a bundle beside its checkpoint in PyTorch, and the peers that `config` asks for: in seconds to the first
    token and for each one after it. The bundle must have the report of a validation that passed; who computes something
    else than eager PyTorch is refused, and not timed.

    `checkpoint` is the folder where the checkpoint is now (None: where it was exported from), `adapter` that of the
    adapter in it; `stage` is told what is done next.

    Raises BundleError when the bundle is not validated or its checkpoint is gone, and BackendError when eager PyTorch,
    which everything is compared with, cannot run.

    >>> import fope_export as fx
    >>> result = fx.bench("out", fx.BenchConfig(lengths=(8,), rounds=1, decoded=1, backends=("onnxruntime",)))
    >>> [cell.contender for cell in result.cells if cell.median("next") > 0]
    ['torch', ...'onnxruntime']
    """
    bundle = Bundle.of(bundle, verify=True)
    tested = {(each.backend, each.variant) for each in require_green(bundle)}
    source_of(bundle, checkpoint, adapter)
    machine, model, export = read_machine(), bundle.manifest.decoder(), bundle.manifest.export
    threads = config.threads or machine.cores
    entries: dict[str, Entry] = {}
    bandwidth = {"read": 0.0, "copy": 0.0}
    sittings: list[list[Cell]] = []
    with scratch() as folder:
        jobs = [
            Job(
                contender=name, bundle=str(bundle.path), checkpoint=str(checkpoint) if checkpoint else None,
                adapter=str(adapter) if adapter else None, folder=str(folder), threads=threads, device=config.device,
            )
            for name in _chosen(config, rounding=bundle.manifest.cache_rounding is not None)
        ]  # fmt: skip
        if config.peers:
            write_twin(model, jobs[0].twin)
        for _ in range(config.sittings):
            with ExitStack() as stack:
                workers: dict[str, Worker] = {}
                for job in jobs:
                    if job.contender not in entries:
                        entries[job.contender] = _enter(job, machine, bundle, workers, stack, stage)
                    elif not entries[job.contender].refused:
                        stage(f"{job.contender}: loading again")
                        workers[job.contender], _ = _seat(job, stack)
                sittings.append([])
                for length, batch in product(config.lengths, config.batch):
                    sittings[-1] += _measure(workers, length, batch, model.vocab_size, config, stage)
                    stage("measuring memory")  # again and again, because others may use it too
                    measured = workers[EAGER].ask("bandwidth")
                    bandwidth = {name: max(bandwidth[name], measured[name]) for name in bandwidth}
    width = DTYPES[export.dtype].itemsize
    cells = tuple(_joined(same) for same in zip(*sittings, strict=True))
    told = tuple(replace(each, validated=_runs(each.name) in tested) for each in entries.values())
    return BenchResult(config, threads, bandwidth, told, cells, model, width)


def _runs(contender: str) -> tuple[str, str]:
    """The backend, and the variant of the bundle in it; of a twin nothing was validated."""
    row = CONTENDERS[contender]
    return ("", "") if row.twin else (row.backend, row.variant)


def _chosen(config: BenchConfig, *, rounding: bool = False) -> Iterator[str]:
    """PyTorch always; backends as asked, and every one where nobody asked, those that round caches with `rounding`
    alone; peers as asked, and the twin with them.
    """
    for name, row in CONTENDERS.items():
        if row.peer:
            wanted = row.peer in config.peers or (row.peer == "any" and bool(config.peers))
        else:
            wanted = not (row.backend and config.backends) or row.backend in config.backends
        wanted = wanted and (not config.only or name in (EAGER, TWIN, *config.only)) and (rounding or not row.cache)
        if wanted and row.device in ("", config.device):
            yield name


def _enter(
    job: Job, machine: Machine, bundle: Bundle, workers: dict[str, Worker], stack: ExitStack, stage: Stage
) -> Entry:
    """Make a contender in a worker of its own, and let eager judge its answers; a reason in the place of failures."""
    row = CONTENDERS[job.contender]
    if row.twin and job.contender != TWIN and TWIN not in workers:
        return Entry(job.contender, row.what, "the twin does not run in PyTorch")
    if reason := row.missing(machine):
        return Entry(job.contender, row.what, reason)
    try:
        if row.prepare:
            stage(f"{job.contender}: exporting the twin")
            with Worker(job.threads) as exporter:
                exporter.ask("prepare", job=_told(job))
        stage(f"{job.contender}: loading and comparing")
        worker, weight_bytes = _seat(job, stack)
        workers[job.contender] = worker
        referee, vocabulary = workers[TWIN if row.twin else EAGER], bundle.manifest.decoder().vocab_size
        away = _compare(worker, referee, vocabulary, job.folder)
    except FopeError as error:
        workers.pop(job.contender, None)
        if job.contender == EAGER:
            raise BackendError(f"PyTorch, which all are compared with: {error}", hint="Does it run at all?") from error
        return Entry(job.contender, row.what, str(error))
    rounding = bundle.manifest.cache_rounding if row.cache else None
    allowed = ALLOWED[row.rounds or bundle.manifest.export.quantize or bundle.manifest.export.dtype]
    allowed = max(allowed, rounding.apart if rounding else 0.0)
    if not away <= allowed:
        del workers[job.contender]
        return Entry(job.contender, row.what, "it does not compute what eager PyTorch computes", away, allowed)
    return Entry(job.contender, row.what, "", away, allowed, weight_bytes)


def _seat(job: Job, stack: ExitStack) -> tuple[Worker, int]:
    """A worker with the contender in it, and the bytes of weights that a token reads."""
    worker = stack.enter_context(Worker(job.threads))
    return worker, worker.ask("load", job=_told(job))["weight_bytes"]


def _told(job: Job) -> dict[str, str | int | None]:
    return {name: getattr(job, name) for name in Job.__struct_fields__}


def _compare(worker: Worker, referee: Worker, vocabulary: int, folder: str) -> float:
    """Let the referee score what the worker answers."""
    prompts = prompt(2, CHECKED, vocabulary)
    tokens = worker.ask("answer", prompts=prompts, new=ANSWERED)["tokens"]
    logits = []
    for name, each in (("reference", referee), ("got", worker)):
        file = f"{folder}/{name}.npy"
        each.ask("scores", prompts=prompts, tokens=tokens, file=file)
        logits.append(np.load(file))
    return distance(logits[0], logits[1], np.array(tokens))


def prompt(batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, the same for everyone; not 0, which may be padding."""
    tokens: list[list[int]] = np.random.default_rng(0).integers(1, vocabulary, (batch, length)).tolist()
    return tokens


def _measure(
    workers: dict[str, Worker], length: int, batch: int, vocabulary: int, config: BenchConfig, stage: Stage
) -> Iterator[Cell]:
    """One size: everybody once without counting, then in turn within each round, each round begun by another."""
    request = {"prompts": prompt(batch, length, vocabulary), "new": config.decoded + 1}
    workers = {
        name: worker for name, worker in workers.items() if name != TWIN or not config.only or name in config.only
    }
    refused, warm = {}, {}
    for name, worker in workers.items():
        stage(f"{batch} x {length}: warming up {name}")
        started = time.perf_counter()
        try:
            worker.ask("time", **request)
        except FopeError as error:
            refused[name] = str(error)
        warm[name] = time.perf_counter() - started
    timed = in_turn(
        {name: partial(worker.ask, "time", **request) for name, worker in workers.items() if name not in refused},
        config.rounds, pause=PAUSE,
        begin=lambda number: stage(f"{batch} x {length}: round {number + 1} of {config.rounds}"),
    )  # fmt: skip
    for name in workers:
        if name in refused:
            yield Cell(name, length, batch, refused=refused[name])
            continue
        first, later, peaks = (tuple(each[what] for each in timed[name]) for what in ("first", "next", "peak"))
        peak = max(peaks) if None not in peaks else None
        yield Cell(name, length, batch, first, later, peak, warm[name])


def _joined(cells: Sequence[Cell]) -> Cell:
    """One contender's cells of one size in all sittings."""
    for cell in cells:
        if cell.refused:
            return cell
    first, later = (tuple(x for cell in cells for x in getattr(cell, what)) for what in ("first", "next"))
    peaks = [cell.peak for cell in cells if cell.peak is not None]
    return replace(cells[0], first=first, next=later, peak=max(peaks, default=None))
