"""The command line: what can be asked, and how a failure is told."""

import argparse
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import NoReturn

import shtab

from fope_export import options
from fope_export.answering import deploy, run, serve
from fope_export.commands import (
    PASSED,
    bench,
    build,
    check,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    optimize,
    perform,
    report,
    validate,
)
from fope_export.errors import ConfigError, FopeError
from fope_export.processes import clean_path
from fope_export.scratch import sweep
from fope_export.tensorrt.compile import cache_folder

MISUSED, BROKEN, INTERRUPTED = 2, 70, 130
UNKNOWN = re.compile(r"(?<=unrecognized arguments: )[^ ]+|(?<=invalid choice: ')[^']+")

SMALLER = "Ask for less at once: a smaller batch, shorter lengths."
EPILOG = """\
examples:
  fope-export export checkpoint/ out/          checkpoint -> portable ONNX bundle
  fope-export validate out/                    prove that it computes what PyTorch computes
  fope-export run out/ --prompt 'def main('    generate text
  fope-export serve out/                       answer OpenAI's API at http://127.0.0.1:8000
  fope-export deploy out/ --target triton new/ a folder with which another server answers
  fope-export bench out/                       how fast it is, beside PyTorch
  fope-export evaluate out/ --against twin/    loss and passkeys by length of context
  fope-export build out/                       TensorRT-RTX engine with the fused rotation, no GPU needed
  fope-export demo                             all of it, on a model that comes along

exit codes: 0 good, 1 a check failed, 2 bad input or misuse, 70 a mistake of the program, 130 interrupted
environment: FOPE_EXPORT_CACHE, the folder for compiled plugins (default: ~/.cache/fope-export); NO_COLOR
"""


class Parser(argparse.ArgumentParser):
    """Whose errors are told as all others."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError, whose hint names what is like a word that nobody knows."""
        wrong = UNKNOWN.search(message)
        near = get_close_matches(wrong[0].partition("=")[0], _names(self), 1) if wrong else []
        meant = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(message, hint=f"{meant}`{self.prog} --help` says what there is.")


def _names(parser: argparse.ArgumentParser) -> set[str]:
    """Its options, what they and its commands may be, and what those of its commands are."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names |= {name for sub in action.choices.values() for name in _names(sub)}
        names |= set(map(str, action.choices or ()))
    return names


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="fope-export",
        description="Language models with FoPE (Fourier Position Embedding): to ONNX and TensorRT, validated, and run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version")
    shtab.add_argument_to(top, "--print-completion", help="print a script that completes commands in this shell")
    subs = top.add_subparsers(metavar="command", title="commands")
    for function, summary, add in (
        (demo, "Export, validate, run and measure the model that comes along, in a minute or two.", options.demo),
        (doctor, "Say what this machine can do, and why not.", options.doctor),
        (export, "Write a checkpoint as a portable ONNX bundle.", options.export),
        (optimize, "Add the form that a runtime runs fastest to a bundle.", options.optimize),
        (build, "Build a TensorRT engine from a bundle, and add it.", options.build),
        (validate, "Compare a bundle with its checkpoint in PyTorch, and write reports into it.", options.validate),
        (run, "Generate text (or token ids) with a bundle.", options.run),
        (serve, "Answer OpenAI's API with one bundle or several.", options.serve),
        (deploy, "Write a folder with which another server answers with a bundle.", options.deploy),
        (bench, "Time a bundle beside PyTorch, and beside other runtimes, and write a report into it.", options.bench),
        (evaluate, "Measure loss and passkeys by length of context, beside a twin.", options.evaluate),
        (check, "Say whether bundles are whole, and validated as they are.", options.check),
        (report, "Compare two reports, or print one as Markdown.", options.report),
        (inspect, "Describe a checkpoint, a bundle or an ONNX file.", options.inspect),
    ):
        sub = subs.add_parser(function.__name__, help=summary, description=summary)
        sub.set_defaults(function=function)
        add(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="tell nothing but the result and what is wrong")
        sub.add_argument("--verbose", action="store_true", help="log what is done, on stderr")
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    clean_path()
    with _ended_by_exceptions():
        return _main(argv)


def _sweep() -> None:
    """Remove what commands that were killed have left in temporary folders."""
    sweep()
    with suppress(RuntimeError):  # there is no home
        sweep(cache_folder())


@contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """What asks this process to end raises SystemExit meanwhile, so that all is cleaned up as after an interrupt. What
    is ignored, as under nohup, stays so.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    asking = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    changed = [number for number in asking if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _main(argv: Sequence[str] | None) -> int:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # when the reader of our output has seen enough, end quietly
    _open_streams()
    as_json = "--json" in (sys.argv if argv is None else argv)
    traced = False
    try:
        args = parser().parse_args(argv)
        if args.version:
            from fope_export import __version__

            print(f"fope-export {__version__}")
            return PASSED
        if "function" not in args:
            parser().print_help()
            return MISUSED
        traced = args.traceback
        _sweep()
        with _told(args):
            code = perform(args)
        sys.stdout.flush()
    except (FopeError, OSError) as error:
        return _refuse(error, traced=traced, as_json=as_json)
    except MemoryError:
        return _refuse(FopeError("there is not enough memory for this", hint=SMALLER), traced=traced, as_json=as_json)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _break(error, as_json=as_json)
    return code


def _break(error: Exception, *, as_json: bool) -> int:
    """Tell of what should not be."""
    if as_json:
        from fope_export.terminal import print_error

        told = FopeError(f"a mistake of fope-export's: {error!r}", hint="Please report it with the traceback.")
        print_error(told, BROKEN, as_json=True, traceback=traceback.format_exc())
    else:
        traceback.print_exc()
        print("this is a mistake of fope-export's: please report it with the lines above", file=sys.stderr)
    return BROKEN


@contextmanager
def _told(args: argparse.Namespace) -> Iterator[None]:
    """What the package warns of, on stderr; with --verbose all that it logs. Progress is left out with --quiet, and
    beside JSON where nobody watches.
    """
    from fope_export.terminal import PROGRESS

    package, shown, quiet = logging.getLogger("fope_export"), logging.StreamHandler(), PROGRESS.quiet
    shown.setLevel(logging.DEBUG if args.verbose else logging.ERROR if args.quiet else logging.WARNING)
    level = package.level
    package.setLevel(logging.DEBUG if args.verbose else level)
    package.addHandler(shown)
    PROGRESS.quiet = quiet or args.quiet or (args.json and not sys.stderr.isatty())
    try:
        yield
    finally:
        PROGRESS.quiet = quiet
        package.setLevel(level)
        package.removeHandler(shown)


def _refuse(error: FopeError | OSError, *, traced: bool, as_json: bool) -> int:
    if isinstance(error, OSError):
        _forget_output()
    if traced:
        traceback.print_exc()
        return MISUSED
    from fope_export.terminal import print_error

    hint = "Check the path, its permissions, and the space on the disk."
    told = error if isinstance(error, FopeError) else FopeError(str(error), hint=hint)
    print_error(told, MISUSED, as_json=as_json)
    return MISUSED


def _open_streams() -> None:
    """A closed stream goes nowhere, in the place of into the next file that opens; a character that the terminal's
    encoding lacks becomes a stand-in.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _forget_output() -> None:
    """Where output cannot be written, what waits to be would fail once more at the end, and change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
