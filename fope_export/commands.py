"""What each command does with its parsed arguments: call, print, and give an exit code, PASSED or FAILED. With
`args.json` all print one JSON document (records.py). Heavy imports wait until a command needs them.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fope_export.errors import ConfigError, missing

if TYPE_CHECKING:
    from fope_export.records import DoctorRecord, ExportRecord, OptimizeRecord, RowRecord

PASSED, FAILED = 0, 1
EXTRAS = {
    "export": "export",
    "optimize": "export",
    "inspect": "export",
    "run": "run",
    "serve": "serve",
    "deploy": "run",
    "validate": "validate",
    "evaluate": "validate",
}
"""What brings the packages that a command needs; `cpu`, which is everything, for the others."""


def perform(args: argparse.Namespace) -> int:
    """Do what was asked. Raises BackendError where a package is not installed, with the extra that brings it."""
    try:
        return int(args.function(args))
    except ModuleNotFoundError as cause:
        package = (cause.name or "").partition(".")[0]
        if not package or find_spec(package):  # it is there, and broken
            raise
        raise missing(package, EXTRAS.get(args.function.__name__, "cpu")) from cause


def demo(args: argparse.Namespace) -> int:
    """Export and validate the shipped models, and write the page that compares them to folder `args.out`. FAILED where
    a validation failed. Or only copy the checkpoint `args.copy` names, which needs no extra.
    """
    if args.copy:
        return _copy(*args.copy, as_json=args.json)
    from fope_export.demo import demo_record, demo_table, run_demo
    from fope_export.terminal import RESULTS, stages

    with stages("demo") as report:
        result = run_demo(args.out, report)
    if args.json:
        print_json(demo_record(result))
    else:
        RESULTS.print(demo_table(result))
        RESULTS.print(f"report: {result.page}", markup=False)
    return PASSED if result.passed else FAILED


def _copy(name: str, folder: str, *, as_json: bool) -> int:
    from fope_export.shipped import copy_shipped
    from fope_export.terminal import RESULTS

    out = copy_shipped(name, Path(folder))
    if as_json:
        print_json({"checkpoint": str(out)})
    else:
        RESULTS.print(f"{out}: the model {name}, {sum(each.stat().st_size for each in out.iterdir()) / 1e6:,.1f} MB")
        RESULTS.print(f"next: fope-export export {out} OUT", markup=False)
    return PASSED


def doctor(args: argparse.Namespace) -> int:
    """Print what this machine has, whether that loads, and what it can do or why not. Always PASSED."""
    from fope_export.backends.choose import abilities
    from fope_export.backends.loading import tried
    from fope_export.backends.machine import read_machine
    from fope_export.terminal import RESULTS, doctor_table, print_sections, waiting

    with waiting("loading what is installed"):
        machine = tried(read_machine())
    if args.json:
        found: DoctorRecord = {"machine": machine, "abilities": abilities(machine)}
        print_json(found)
        return PASSED
    print_sections(
        {
            "machine": {"system": f"{machine.system}, {machine.cores} cores", "python": machine.python},
            "libraries": machine.packages,
            "hardware": {"GPUs": ", ".join(machine.gpus) or "none", "compiler": machine.compiler or "none"},
        }
    )
    RESULTS.print("[bold]can it[/]")
    RESULTS.print(doctor_table(abilities(machine)))
    return PASSED


def export(args: argparse.Namespace) -> int:
    """Write the bundle of `args.checkpoint` to `args.out`, in the way that the fields of ExportConfig among `args` say.
    Raises as `export` does.
    """
    from fope_export.config import ExportConfig, convert
    from fope_export.graph.export import export as export_bundle
    from fope_export.terminal import RESULTS, stages

    options = {name: getattr(args, name) for name in ExportConfig.__struct_fields__}
    config = convert(options, ExportConfig, where="export", hint="See fope-export export --help.")
    with stages("export") as report:
        bundle = export_bundle(
            args.checkpoint, args.out, config, adapter=args.adapter, calibration=args.calibration,
            lock_timeout=args.lock_timeout, report=report, progress=report.progress,
        )  # fmt: skip
    if args.json:
        made: ExportRecord = {"bundle": str(bundle.path), "manifest": bundle.manifest}
        print_json(made)
    else:
        size = sum((bundle.path / name).stat().st_size for name in bundle.manifest.files)
        RESULTS.print(f"{bundle.path}: {size / 1e6:,.1f} MB, {bundle.manifest.export.described}", markup=False)
        RESULTS.print(f"next: fope-export validate {bundle.path}", markup=False)
    return PASSED


def optimize(args: argparse.Namespace) -> int:
    """Add what `args.target` is fastest with to the bundle `args.bundle`. Raises as `optimize` does."""
    from fope_export.bundle import Bundle
    from fope_export.graph.optimize import ONNXRUNTIME, optimize
    from fope_export.manifest import OPENVINO, OPTIMIZED, weights_file
    from fope_export.terminal import RESULTS, waiting

    with waiting(f"optimizing for {args.target}"):
        bundle = optimize(
            Bundle.open(args.bundle), args.target, int8_activations=args.int8_activations, cache=args.cache,
            calibration=args.calibration, lock_timeout=args.lock_timeout,
        )  # fmt: skip
    file, weights = (
        (OPTIMIZED, f"stay in {weights_file(bundle.manifest.export)}")
        if args.target == ONNXRUNTIME
        else (OPENVINO, "lie beside it")
    )
    if args.json:
        made: OptimizeRecord = {"bundle": str(bundle.path), "file": file}
        print_json(made)
    else:
        RESULTS.print(f"{bundle.path / file}: the weights {weights}", markup=False)
        RESULTS.print(f"next: fope-export validate {bundle.path}", markup=False)
    return PASSED


def build(args: argparse.Namespace) -> int:
    """Add an engine to the bundle `args.bundle`, built as the fields of BuildConfig among `args` say. Raises as `build`
    does.
    """
    from fope_export.bundle import Bundle
    from fope_export.config import BuildConfig, convert
    from fope_export.onnx_files import check_graphs
    from fope_export.tensorrt.build import build as build_engine
    from fope_export.tensorrt.record import plan_name
    from fope_export.terminal import RESULTS, progress

    options = {name: getattr(args, name) for name in BuildConfig.__struct_fields__} | {"sizes": dict(args.sizes)}
    config = convert(options, BuildConfig, where="build", hint="See fope-export build --help.")
    bundle = Bundle.open(args.bundle)
    check_graphs(bundle)
    with progress("build") as report:
        bundle, record = build_engine(bundle, config, lock_timeout=args.lock_timeout, report=report)
    if args.json:
        print_json(record)
    else:
        place, seconds = bundle.path / plan_name(record.target), sum(record.seconds.values())
        RESULTS.print(
            f"{place}: {record.plan_bytes / 1e6:,.1f} MB in {seconds:.1f} s, {record.library} {record.library_version}",
            markup=False,
        )
        RESULTS.print(record.described, markup=False)
    return PASSED


def validate(args: argparse.Namespace) -> int:
    """Compare the bundle `args.bundle` with its checkpoint, and write reports into it, or where `args.out` and
    `args.junit` say. FAILED where a comparison failed. Raises as `validate` does.
    """
    from fope_export.bundle import Bundle
    from fope_export.parity.run import validate as validate_bundle
    from fope_export.report import parity_record, print_parity, write_reports
    from fope_export.terminal import RESULTS, progress

    if args.stages:
        return _validate_stages(args)
    bundle = Bundle.open(args.bundle, verify=False)
    with progress("validate") as report:
        result = validate_bundle(
            bundle, checkpoint=args.checkpoint, adapter=args.adapter, backend=args.backend, lengths=args.lengths,
            seed=args.seed, load=args.load_inputs, save=args.save_inputs, report=report,
        )  # fmt: skip
    if args.json:
        print_json(parity_record(bundle, result))
    else:
        print_parity(result, RESULTS)
    for written in write_reports(bundle, result, args.out, args.junit, lock_timeout=args.lock_timeout):
        if isinstance(written, OSError):
            _unwritten(written)
        elif not args.json:
            RESULTS.print(f"report: {written}", markup=False)
    return PASSED if result.passed else FAILED


def _validate_stages(args: argparse.Namespace) -> int:
    """The same layer by layer. Raises ConfigError for arguments that it does not have."""
    from fope_export.bundle import Bundle
    from fope_export.parity.stages import validate_stages
    from fope_export.stages_report import print_stages, stages_record, write_stages
    from fope_export.terminal import RESULTS, progress

    unknown = ("lengths", "save_inputs", "load_inputs", "junit", "backend")
    if given := [name for name in unknown if getattr(args, name)]:
        raise ConfigError(
            f"--stages takes no --{given[0].replace('_', '-')}", hint="It runs the portable file in ONNX Runtime."
        )
    bundle = Bundle.open(args.bundle, verify=False)
    with progress("validate") as report:
        result = validate_stages(
            bundle, checkpoint=args.checkpoint, adapter=args.adapter, seed=args.seed, report=report
        )
    if args.json:
        print_json(stages_record(bundle, result))
    else:
        print_stages(result, RESULTS)
    _tell_page(lambda: write_stages(bundle, result, args.out, lock_timeout=args.lock_timeout), args)
    return PASSED if result.passed else FAILED


def bench(args: argparse.Namespace) -> int:
    """Time the bundle `args.bundle` beside PyTorch, as the fields of BenchConfig among `args` say, beside an older
    result if `args.compare` names one; write the report. Raises as `bench` does.
    """
    from fope_export.bench_report import bench_record, print_bench, read_old, write_bench
    from fope_export.benchmark.run import BenchConfig
    from fope_export.benchmark.run import bench as bench_bundle
    from fope_export.bundle import Bundle
    from fope_export.config import convert
    from fope_export.terminal import RESULTS, stages

    options = {name: getattr(args, name) for name in BenchConfig.__struct_fields__}
    config = convert(options, BenchConfig, where="bench", hint="See fope-export bench --help.")
    old = read_old(args.compare) if args.compare else None
    bundle = Bundle.open(args.bundle)
    with stages("bench") as report:
        result = bench_bundle(bundle, config, checkpoint=args.checkpoint, adapter=args.adapter, stage=report)
    if args.json:
        print_json(bench_record(bundle, result))
    else:
        print_bench(bundle, result, RESULTS, old)
    _tell_page(lambda: write_bench(bundle, result, args.out, lock_timeout=args.lock_timeout), args)
    return PASSED


def evaluate(args: argparse.Namespace) -> int:
    """Measure loss and passkeys by length of context of the bundle `args.bundle`, beside `args.against` if that names
    another, as the fields of EvaluationConfig among `args` say; write the report. Raises as `evaluate` does.
    """
    import msgspec

    from fope_export.bundle import Bundle
    from fope_export.config import convert
    from fope_export.evaluation import EvaluationConfig
    from fope_export.evaluation import evaluate as evaluate_bundle
    from fope_export.evaluation_report import evaluation_record, print_evaluation, write_evaluation
    from fope_export.terminal import RESULTS, progress

    options = {name: getattr(args, name) for name in EvaluationConfig.__struct_fields__}
    config = convert(options, EvaluationConfig, where="evaluate", hint="See fope-export evaluate --help.")
    bundle, *twin = [Bundle.open(path) for path in (args.bundle, args.against) if path]
    results = []
    for each in (bundle, *twin):
        with progress(each.path.name) as report:
            results.append(evaluate_bundle(each, config, data=args.data, backend=args.backend, report=report))
        config = msgspec.structs.replace(config, lengths=tuple(results[0].losses))
    if twin and results[0].name == results[1].name:
        results = [replace(each, name=f"{each.name} {number}") for number, each in enumerate(results, start=1)]
    if args.json:
        print_json(evaluation_record(results))
    else:
        print_evaluation(results, RESULTS)
    _tell_page(lambda: write_evaluation(bundle, results, args.out, lock_timeout=args.lock_timeout), args)
    return PASSED


def check(args: argparse.Namespace) -> int:
    """Say of the bundles `args.paths`, or those that these files belong to, whether they are whole, and validated as
    they are. FAILED where one is not.
    """
    from fope_export.bundle import Bundle
    from fope_export.errors import BundleError
    from fope_export.manifest import MANIFEST
    from fope_export.validated import require_green

    folders = dict.fromkeys(
        next((each for each in (path, *path.parents) if (each / MANIFEST).is_file()), path) for path in args.paths
    )
    found = dict[str, str]()
    for folder in folders:
        bundle = Bundle.open(folder, verify=False)
        found[str(folder)] = "; ".join(f"{name} {reason}" for name, reason in bundle.damaged().items())
        if not found[str(folder)]:
            try:
                require_green(bundle)
            except BundleError as error:
                found[str(folder)] = f"{error}. {error.hint}"
    if args.json:
        print_json(found)
    else:
        for name, reason in found.items():
            print(f"{name}: {reason or 'whole, and validated as it is'}")
    return FAILED if any(found.values()) else PASSED


def report(args: argparse.Namespace) -> int:
    """Print two of `args.reports` beside each other, or one as Markdown. Raises ConfigError where one is none, and for
    more or fewer.
    """
    from rich.table import Table

    from fope_export.comparison import compare, markdown, read, told
    from fope_export.terminal import RESULTS

    if len(args.reports) != (needed := 2 if args.what == "compare" else 1):
        raise ConfigError(f"{args.what} takes {needed}, not {len(args.reports)}", hint="See fope-export report --help.")
    if args.what == "summary":
        print(markdown(read(args.reports[0]), args.reports[0].resolve().name))
        return PASSED
    rows = compare(*map(read, args.reports))
    if args.json:
        records: list[RowRecord] = [
            {"what": row.what, "before": row.before, "after": row.after, "ratio": row.ratio} for row in rows
        ]
        print_json(records)
        return PASSED
    table = Table("", "before", "after", "after / before", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(row.what, told(row.before), told(row.after), told(row.ratio))
    RESULTS.print(table)
    return PASSED


def inspect(args: argparse.Namespace) -> int:
    """Print what lies at `args.path`: a checkpoint or a bundle. Raises the error that says why it is neither."""
    from fope_export.inspection import in_words
    from fope_export.inspection import inspect as describe
    from fope_export.terminal import print_sections, waiting

    with waiting("reading"):
        description = describe(args.path)
    print_json(description) if args.json else print_sections(in_words(description))
    return PASSED


def _tell_page(write: Callable[[], Path], args: argparse.Namespace) -> None:
    """Write a report and say where it is, or why it is not there."""
    from fope_export.terminal import RESULTS

    try:
        page = write()
    except OSError as cause:
        _unwritten(cause)
    else:
        if not args.json:
            RESULTS.print(f"report: {page}", markup=False)


def _unwritten(cause: OSError) -> None:
    """Say on stderr that a report is not there; what it would have told was printed."""
    from fope_export.terminal import ERRORS

    ERRORS.print(f"the report was not written: {cause}; --out FOLDER puts it elsewhere", markup=False)


def print_json(value: Any) -> None:
    """With escapes where the terminal's encoding lacks a character."""
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=dict), indent=2).decode()
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)
    print(text)
