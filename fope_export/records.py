"""What each command prints with `--json`, key by key. Keys and their meanings stay; more may come."""

from typing import Any, NotRequired, TypeAlias, TypedDict

import msgspec

from fope_export.backends.machine import Machine
from fope_export.benchmark.run import BenchConfig, Entry
from fope_export.deploy.run import Expected
from fope_export.evaluation import Found
from fope_export.inspection import Description
from fope_export.manifest import Manifest, Source
from fope_export.parity.extended import Reach
from fope_export.parity.results import Place
from fope_export.parity.stages import StageResult
from fope_export.tensorrt.record import EngineRecord
from fope_export.validated import Tested

Ratios: TypeAlias = dict[str, float | None]
"""Errors in units of rounding, by how they are taken; null where they are infinite."""


class Errors(TypedDict):
    """How far logits are from the truth (`judge.Measure`); null where that is infinite."""

    max_abs: float | None
    relative: float | None
    cosine: float | None
    kl: float | None
    flips: int
    non_finite: int


class CaseRecord(TypedDict):
    """One comparison of the bundle with PyTorch."""

    name: str
    passed: bool
    failed: tuple[str, ...]
    tokens: int
    positions: tuple[int, int] | None
    steps: int
    compared: int
    seconds: float
    ratios: Ratios
    limits: dict[str, float]
    members: int
    error: Errors
    pytorch_error: Errors


class ColumnRecord(TypedDict):
    """One logit over all tokens: the worst."""

    name: str
    passed: bool
    logit: int
    ratio: float | None
    limit: float
    members: int


class ControlRecord(TypedDict):
    """A model that is wrong on purpose."""

    name: str
    passed: bool
    skipped: str | None
    refused_by: tuple[str, ...]
    ratios: Ratios | None
    error: Errors | None


class CostRecord(TypedDict):
    """What rounding weights or caches costs, beside what it may: `growth` is that of the perplexity, as a share."""

    kind: str
    tokens: int
    kl: float
    perplexity: float | None
    quantized: float | None
    strays: tuple[str, ...]
    growth: float | None
    limit: float
    passed: bool
    failed: tuple[str, ...]
    backend: NotRequired[str]


class RuleRecord(TypedDict):
    """By what the cases are judged."""

    limits: dict[str, float]
    allowance: float
    truth: str
    noise: str


class ParityRecord(TypedDict):
    """`validate`, and `reports/parity.json`."""

    passed: bool
    failures: list[str]
    backend: str
    model_sha256: str | None
    files: dict[str, str]
    tested: tuple[Tested, ...]
    source: Source
    dtype: str
    training_length: int | None
    rule: RuleRecord
    cases: list[CaseRecord]
    columns: list[ColumnRecord]
    controls: list[ControlRecord]
    quantization: CostRecord | None
    caches: list[CostRecord]
    extension: Reach | None
    damaged_files: dict[str, str]
    broken: str | None
    place: Place | None
    date: str
    seconds: float
    tool_version: str
    machine: Machine


class StagesRule(TypedDict):
    """By what stages are judged."""

    limits: dict[str, float]
    truth: str
    noise: str


class StagesRecord(TypedDict):
    """`validate --stages`, and `reports/stages.json`."""

    passed: bool
    failures: list[str]
    files: dict[str, str]
    source: Source
    dtype: str
    rule: StagesRule
    stages: tuple[StageResult, ...]
    damaged_files: dict[str, str]
    tool_version: str
    machine: Machine


class CellRecord(TypedDict):
    """One contender at one size; why it was not timed, or its medians and the milliseconds of every round."""

    contender: str
    length: int
    batch: int
    refused: NotRequired[str]
    first_token_ms: NotRequired[float]
    prefill_tokens_per_s: NotRequired[float]
    prefill_over_eager: NotRequired[float | None]
    next_token_ms: NotRequired[float]
    decode_tokens_per_s: NotRequired[float]
    decode_over_eager: NotRequired[float | None]
    bandwidth_share: NotRequired[float]
    peak_MiB: NotRequired[int | None]
    warm_up_s: NotRequired[float]
    rounds_ms: NotRequired[dict[str, list[float]]]


class LeadRecord(TypedDict):
    """The fastest of ours over the fastest peer."""

    what: str
    length: int
    batch: int
    ours: str
    peer: str
    ratio: float
    interval: tuple[float, float] | None


class BenchMachine(TypedDict):
    """`machine`, with its processor and the load of the last 1, 5 and 15 minutes."""

    system: str
    python: str
    cores: int
    gpus: tuple[str, ...]
    packages: dict[str, str]
    compiler: str
    without_compiler: str
    architectures: tuple[str, ...]
    processor: str
    load: list[float]


class BenchRecord(TypedDict):
    """`bench`, and `reports/bench.json`."""

    date: str
    model_sha256: str
    export: str
    tool_version: str
    machine: BenchMachine
    threads: int
    bandwidth_GB_per_s: dict[str, float]
    config: BenchConfig
    contenders: tuple[Entry, ...]
    cells: list[CellRecord]
    over_best_peer: list[LeadRecord]


class EvaluatedRecord(TypedDict):
    """One model, by length of context: mean nats per token, passkeys found at each depth, and their share."""

    name: str
    backend: str
    trained: int
    losses: dict[int, float]
    found: tuple[Found, ...]
    passkey_accuracy: dict[int, float]


class EvaluationRecord(TypedDict):
    """`evaluate`, and `reports/evaluation.json`."""

    date: str
    machine: Machine
    models: list[EvaluatedRecord]


class DemoModel(TypedDict):
    """One model of the demo; losses by backend and length of context."""

    parity: bool
    nats_per_byte: dict[str, dict[int, float]]


class DemoRecord(TypedDict):
    """`demo`: whether both models passed, their losses, what the first of them wrote, and where the page is."""

    passed: bool
    models: dict[str, DemoModel]
    text: str
    report: str


class CopyRecord(TypedDict):
    """`demo --copy`: where the checkpoint is."""

    checkpoint: str


class DoctorRecord(TypedDict):
    """`doctor`: the machine, and by ability why it is not there, or nothing."""

    machine: Machine
    abilities: dict[str, str]


class ExportRecord(TypedDict):
    """`export`: where the bundle is, and what its `fope_export.json` says."""

    bundle: str
    manifest: Manifest


class OptimizeRecord(TypedDict):
    """`optimize`: where the bundle is, and the file in it that was written."""

    bundle: str
    file: str


class AnswerRecord(TypedDict):
    """`run`, of each prompt; tokens a step are more than 1 where guesses were right."""

    prompt: str
    text: str
    tokens_per_step: float


class ServeRecord(TypedDict):
    """`serve`, in one line, once it answers."""

    url: str


class DeployRecord(TypedDict):
    """`deploy`: where the folder is, and what its `check` asks and expects."""

    target: str
    folder: str
    expected: Expected


class RowRecord(TypedDict):
    """`report compare`, of each number; null where one of the two reports lacks it."""

    what: str
    before: float | None
    after: float | None
    ratio: float | None


class ErrorRecord(TypedDict):
    """What went wrong, what to do next, and the exit code; the traceback for mistakes of the program."""

    type: str
    message: str
    hint: str
    exit_code: int
    traceback: NotRequired[str]


class Refused(TypedDict):
    """What any command prints on stderr where it ends with 2 or more."""

    error: ErrorRecord


RECORDS: dict[str, Any] = {
    "demo": DemoRecord,
    "demo-copy": CopyRecord,
    "doctor": DoctorRecord,
    "inspect": Description,
    "export": ExportRecord,
    "optimize": OptimizeRecord,
    "build": EngineRecord,
    "validate": ParityRecord,
    "validate-stages": StagesRecord,
    "run": list[AnswerRecord],
    "run-prompt-ids": list[int],
    "bench": BenchRecord,
    "evaluate": EvaluationRecord,
    "serve": ServeRecord,
    "deploy": DeployRecord,
    "check": dict[str, str],
    "report-compare": list[RowRecord],
    "error": Refused,
}
"""By command, and by the option that changes it; `error` is any command's. `check` gives by bundle why it is not good,
or nothing.
"""


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of one of RECORDS."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(RECORDS[name])}
