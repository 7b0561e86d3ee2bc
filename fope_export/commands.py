"""What each command does with its parsed arguments: call, print, and give an exit code, PASSED or FAILED. With
`args.json` all print one JSON document. Heavy imports wait until a command needs them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fope_export.errors import ConfigError, missing

if TYPE_CHECKING:
    from fope_export.bundle import Bundle

PASSED, FAILED = 0, 1
EXTRAS = {"export": "export", "optimize": "export", "inspect": "export", "run": "run", "validate": "validate"}
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
    a validation failed.
    """
    from fope_export.demo import demo_record, demo_table, run_demo
    from fope_export.terminal import RESULTS, stages

    with stages("demo") as report:
        result = run_demo(args.out, report)
    if args.json:
        _print_json(demo_record(result))
    else:
        RESULTS.print(demo_table(result))
        RESULTS.print(f"report: {result.page}", markup=False)
    return PASSED if result.passed else FAILED


def doctor(args: argparse.Namespace) -> int:
    """Print what this machine has, and what it can do or why not. Always PASSED."""
    from fope_export.backends.choose import abilities, read_machine
    from fope_export.terminal import RESULTS, doctor_table, print_sections

    machine = read_machine()
    if args.json:
        _print_json({"machine": machine, "abilities": abilities(machine)})
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
        _print_json({"bundle": str(bundle.path), "manifest": bundle.manifest})
    else:
        size = sum((bundle.path / name).stat().st_size for name in bundle.manifest.files)
        RESULTS.print(f"{bundle.path}: {size / 1e6:,.1f} MB, {bundle.manifest.export.described}", markup=False)
        RESULTS.print(f"next: fope-export validate {bundle.path}", markup=False)
    return PASSED


def optimize(args: argparse.Namespace) -> int:
    """Add the file for ONNX Runtime to the bundle `args.bundle`. Raises as `optimize` does."""
    from fope_export.bundle import Bundle
    from fope_export.graph.optimize import optimize
    from fope_export.manifest import OPTIMIZED
    from fope_export.terminal import RESULTS, waiting

    with waiting("optimizing"):
        bundle = optimize(
            Bundle.open(args.bundle), int8_activations=args.int8_activations, lock_timeout=args.lock_timeout
        )
    if args.json:
        _print_json({"bundle": str(bundle.path), "file": OPTIMIZED})
    else:
        RESULTS.print(f"{bundle.path / OPTIMIZED}: the weights stay in model.onnx.data", markup=False)
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
        _print_json(record)
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

    bundle = Bundle.open(args.bundle, verify=False)
    with progress("validate") as report:
        result = validate_bundle(
            bundle, checkpoint=args.checkpoint, adapter=args.adapter, backend=args.backend, lengths=args.lengths,
            seed=args.seed, load=args.load_inputs, save=args.save_inputs, report=report,
        )  # fmt: skip
    if args.json:
        _print_json(parity_record(bundle, result))
    else:
        print_parity(result, RESULTS)
    for written in write_reports(bundle, result, args.out, args.junit, lock_timeout=args.lock_timeout):
        if isinstance(written, OSError):
            _unwritten(written)
        elif not args.json:
            RESULTS.print(f"report: {written}", markup=False)
    return PASSED if result.passed else FAILED


def run(args: argparse.Namespace) -> int:
    """Print what the bundle `args.bundle` answers to a prompt, to a file of prompts or messages, or to token ids; the
    fields of SamplingParams among `args` say how. Raises as `load_backend` and `generate_text` do, and ConfigError for
    arguments that exclude each other.
    """
    from fope_export.backends.choose import Settings, load_backend
    from fope_export.bundle import Bundle
    from fope_export.config import convert
    from fope_export.generation import generate, generate_text
    from fope_export.onnx_files import check_graphs
    from fope_export.serving.sampling import SamplingParams
    from fope_export.terminal import report_speed, waiting
    from fope_export.tokens import Tokenizer

    options = {name: getattr(args, name) for name in SamplingParams.__struct_fields__}
    sampling = convert(
        options | {"logit_bias": dict(args.logit_bias)}, SamplingParams, where="run", hint="See fope-export run --help."
    )
    _check_chat(args)
    with waiting("loading"):
        bundle = Bundle.open(args.bundle)
        check_graphs(bundle)
        settings = Settings(optimized=args.optimized, threads=args.threads, cuda_graph=args.cuda_graph)
        backend = load_backend(bundle, args.backend, settings)
    ends = bundle.manifest.decoder().ends
    if args.prompt_ids:
        if args.stop:
            raise ConfigError("--stop needs text, and --prompt-ids gives ids", hint="Leave one of them out.")
        steps = generate(backend, [_known(args.prompt_ids, bundle)], sampling, eos=ends, chunk=args.chunk)
        _print_ids((token for _, token in steps), as_json=args.json)
        return PASSED
    prompts = [args.prompt] if args.prompt is not None else _read_prompts(args.prompts) if args.prompts else [""]
    asked = _asked(args, bundle, prompts)
    pieces = generate_text(
        backend, Tokenizer(bundle.path), asked or prompts, sampling, stop=args.stop, eos=ends, chunk=args.chunk,
        max_batch=args.max_batch, special=not asked,
    )  # fmt: skip
    texts = [""] * len(prompts)
    with report_speed() as count:
        for row, piece in pieces:
            texts[row] += piece
            count(piece)
            if len(prompts) == 1 and not args.json:
                print(piece, end="", flush=True)
    if args.json:
        _print_json([{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)])
    elif len(prompts) == 1:
        print()
    else:
        for prompt, written in zip(prompts, texts, strict=True):
            print(f"--- {prompt}\n{written}")
    return PASSED


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
        _print_json(bench_record(bundle, result))
    else:
        print_bench(result, RESULTS, old)
    try:
        page = write_bench(bundle, result, args.out, lock_timeout=args.lock_timeout)
    except OSError as cause:
        _unwritten(cause)
        return PASSED
    if not args.json:
        RESULTS.print(f"report: {page}", markup=False)
    return PASSED


def inspect(args: argparse.Namespace) -> int:
    """Print what lies at `args.path`: a checkpoint or a bundle. Raises the error that says why it is neither."""
    from fope_export.inspection import inspect as describe
    from fope_export.terminal import print_sections, waiting

    with waiting("reading"):
        description = describe(args.path)
    _print_json(description) if args.json else print_sections(description)
    return PASSED


def _unwritten(cause: OSError) -> None:
    """Say on stderr that a report is not there; what it would have told was printed."""
    from fope_export.terminal import ERRORS

    ERRORS.print(f"the report was not written: {cause}; --out FOLDER puts it elsewhere", markup=False)


def _known(ids: Sequence[int], bundle: "Bundle") -> Sequence[int]:
    vocabulary = bundle.manifest.decoder().vocab_size
    if max(ids) >= vocabulary:
        raise ConfigError(f"token {max(ids)} is outside the vocabulary of {vocabulary}", hint="Ids start at 0.")
    return ids


def _check_chat(args: argparse.Namespace) -> None:
    """Before anything loads."""
    if args.system is not None and not (args.chat or args.messages):
        raise ConfigError("--system is the first message of a chat, and this is none", hint="Add --chat.")
    if args.chat and args.prompt_ids:
        raise ConfigError("--chat makes a prompt of text, and --prompt-ids gives ids", hint="Leave one of them out.")


def _asked(args: argparse.Namespace, bundle: "Bundle", prompts: Sequence[str]) -> list[str]:
    """What the chat template makes of each prompt, or of the messages in a file; nothing without a chat."""
    if not (args.chat or args.messages):
        return []
    from fope_export.chat import Chat, read_messages

    chat = Chat(bundle.path)
    first = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.messages:
        return [chat.render([*first, *read_messages(args.messages)])]
    return [chat.render([*first, {"role": "user", "content": prompt}]) for prompt in prompts]


def _read_prompts(path: Path) -> list[str]:
    """Lines end with a line feed alone, or with a carriage return before it: other separators belong to a prompt."""
    from fope_export.documents import read_json_lines, read_text

    hint = "One prompt a line; in a .jsonl file, one JSON string a line; in UTF-8."
    if path.suffix == ".jsonl":
        prompts = read_json_lines(path, raises=ConfigError, hint=hint)
    else:
        lines = read_text(path, raises=ConfigError, hint=hint).split("\n")
        prompts = [line for each in lines if (line := each.removesuffix("\r")).strip(" \t")]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"{path}: no prompts", hint=hint)
    return prompts


def _print_ids(ids: Iterable[int], *, as_json: bool) -> None:
    if as_json:
        _print_json(list(ids))
        return
    for i, token in enumerate(ids):
        print(f"{',' if i else ''}{token}", end="", flush=True)
    print()


def _print_json(value: Any) -> None:
    """With escapes where the terminal's encoding lacks a character."""
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=dict), indent=2).decode()
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)
    print(text)
