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
from pathlib import Path
from typing import NoReturn

from fope_export.commands import PASSED, bench, build, demo, doctor, export, inspect, optimize, perform, run, validate
from fope_export.dtypes import DTYPES, FP32, either
from fope_export.errors import MESSAGE, FopeError, cut
from fope_export.lock import TIMEOUT
from fope_export.model.layouts import LAYOUTS
from fope_export.processes import clean_path
from fope_export.quantizations import QUANTIZATIONS, Quantization, calibrated
from fope_export.scratch import sweep
from fope_export.tensorrt.compile import cache_folder

MISUSED, BROKEN, INTERRUPTED = 2, 70, 130
DIGITS = re.compile(r"[0-9]{1,18}")

SMALLER = "Ask for less at once: a smaller batch, shorter lengths."
EPILOG = """\
examples:
  fope-export export checkpoint/ out/          checkpoint -> portable ONNX bundle
  fope-export validate out/                    prove that it computes what PyTorch computes
  fope-export run out/ --prompt 'def main('    generate text
  fope-export bench out/                       how fast it is, beside PyTorch
  fope-export build out/                       TensorRT-RTX engine with the fused rotation, no GPU needed
  fope-export demo                             all of it, on a model that comes along

exit codes: 0 good, 1 a check failed, 2 bad input or misuse
"""


class Parser(argparse.ArgumentParser):
    """Whose messages are as short as all others."""

    def error(self, message: str) -> NoReturn:
        super().error(cut(message, MESSAGE))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="fope-export",
        description="Language models with FoPE (Fourier Position Embedding): to ONNX and TensorRT, validated, and run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version")
    subs = top.add_subparsers(metavar="command", title="commands")
    for function, summary, options in (
        (demo, "Export, validate, run and measure the model that comes along, in a minute or two.", _demo_options),
        (doctor, "Say what this machine can do, and why not.", _doctor_options),
        (export, "Write a checkpoint as a portable ONNX bundle.", _export_options),
        (optimize, "Add the form that ONNX Runtime runs fastest to a bundle.", _optimize_options),
        (build, "Build a TensorRT engine from a bundle, and add it.", _build_options),
        (validate, "Compare a bundle with its checkpoint in PyTorch, and write reports into it.", _validate_options),
        (run, "Generate text (or token ids) with a bundle.", _run_options),
        (bench, "Time a bundle beside PyTorch, and beside other runtimes, and write a report into it.", _bench_options),
        (inspect, "Describe a checkpoint, a bundle or an ONNX file.", _inspect_options),
    ):
        sub = subs.add_parser(function.__name__, help=summary, description=summary)
        sub.set_defaults(function=function)
        options(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
    return top


def _demo_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, default=Path("demo"), help="folder for bundles and report (default: demo)")


def _doctor_options(_: argparse.ArgumentParser) -> None:
    """None of its own."""


def _export_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, metavar="CKPT", help=f"folder with the checkpoint ({', '.join(LAYOUTS)})")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder for the bundle; one that stands there is replaced")
    sub.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter that PEFT saved, to merge into it")
    sub.add_argument("--dtype", choices=(*DTYPES,), default=FP32.name, help="of weights and activations")
    sub.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="grown, or written in place")
    sub.add_argument(
        "--capacity", type=_natural, metavar="TOKENS", help="of a static cache (default: 16 x trained, at most 8192)"
    )
    sub.add_argument("--opset", type=_natural, choices=(23, 24), help="ONNX opset (default: 23; 24 for a static cache)")
    sub.add_argument("--extend", choices=("pi", "yarn"), help="change the frequencies for longer contexts")
    sub.add_argument("--extend-to", type=_natural, metavar="TOKENS", help="how far (default: 16 x trained, <=8192)")
    sub.add_argument(
        "--fold-padding", action="store_true", help="leave padded channels unrotated, their scale in the projections"
    )
    sub.add_argument("--position-axes", action="store_true", help="position_ids on all of the model's axes, for images")
    sub.add_argument(
        "--quantize", choices=(*QUANTIZATIONS,),
        help=f"linear layers: {'; '.join(map(_quantization, QUANTIZATIONS.values()))} (default: not)",
    )  # fmt: skip
    sub.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help=f"text, or ids as .npy or .json, for {either(calibrated())} (default: Python's own)",
    )  # fmt: skip
    _lock(sub)


def _quantization(row: Quantization) -> str:
    return f"{row.name} {row.rounded}, for {'TensorRT' if row.engines else 'ONNX Runtime'}"


def _optimize_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", type=Path, metavar="OUT")
    sub.add_argument(
        "--int8-activations", action=argparse.BooleanOptionalAction, default=True,
        help="round activations too where weights are quantized: several times faster",
    )  # fmt: skip
    _lock(sub)


def _build_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", type=Path, metavar="OUT")
    sub.add_argument(
        "--target", default="tensorrt-rtx",
        help="tensorrt (for the GPU at hand), tensorrt-rtx, or for GPUs by name tensorrt-rtx:sm86,sm89,sm120 (default)",
    )  # fmt: skip
    sub.add_argument(
        "--plugin", action=argparse.BooleanOptionalAction, default=True, help="the rotation as one fused kernel"
    )
    sub.add_argument("--max-batch", type=_natural, default=4, help="rows at once (default: 4)")
    sub.add_argument(
        "--max-length", type=_natural, metavar="TOKENS", help="prompt and answer (default: 16 x trained, <=8192)"
    )
    sub.add_argument(
        "--size", type=_size, action="append", default=[], dest="sizes", metavar="NAME=LEAST,BEST,LARGEST",
        help="of a module's bundle; may be repeated (default: up to 4 x its example's)",
    )  # fmt: skip
    sub.add_argument(
        "--timing-cache", action=argparse.BooleanOptionalAction, default=True, help="reuse what earlier builds measured"
    )
    sub.add_argument("--tf32", action="store_true", help="let float32 products round to 10 bits")
    sub.add_argument("--refit", action="store_true", help="weights can be replaced later (needs a GPU)")
    sub.add_argument("--strip", action="store_true", help="leave the weights out, to be refitted (needs a GPU)")
    _lock(sub)
    sub.add_argument("--version-compatible", action="store_true", help="runs in later versions of TensorRT too")
    sub.add_argument("--hardware-compatible", action="store_true", help="runs on all GPUs from Ampere on")


def _validate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", type=Path, metavar="OUT")
    _origin(sub)
    sub.add_argument(
        "--lengths", type=_numbers, default=(), help="prefill lengths, as 64,512 (default: 1 to 16 x trained)"
    )
    sub.add_argument("--seed", type=_natural, default=0, help="of the random tokens (default: 0)")
    sub.add_argument("--save-inputs", type=Path, metavar="FILE", help="write the inputs as Polygraphy JSON")
    sub.add_argument("--load-inputs", type=Path, metavar="FILE", help="compare on these inputs instead")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="for the reports (default: OUT/reports)")
    sub.add_argument("--junit", type=Path, metavar="FILE", help="write the JUnit report there too")
    _lock(sub)
    _backend(sub)


def _run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", type=Path, metavar="OUT")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a batch: one prompt a line, or JSON strings in .jsonl"
    )
    source.add_argument("--prompt-ids", type=_numbers, help="token ids to continue, as 12,7,99")
    source.add_argument(
        "--messages", type=Path, metavar="FILE", help='a chat: JSON, [{"role": "user", "content": "..."}, ...]'
    )
    sub.add_argument("--chat", action="store_true", help="each prompt is a user's message, put into the chat template")
    sub.add_argument("--system", metavar="TEXT", help="of a chat: its first message, of the system")
    sub.add_argument("--max-new-tokens", type=_natural, default=128, help="default: 128")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sub.add_argument("--top-k", type=_natural, default=0, help="draw from the k likeliest tokens; 0 is all (default)")
    sub.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens that reach p (default: 1)")
    sub.add_argument("--min-p", type=float, default=0.0, help="leave out tokens below p times the likeliest's odds")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 against tokens that came before")
    sub.add_argument("--presence-penalty", type=float, default=0.0, help="taken from logits of tokens in the answer")
    sub.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, as often as they are there")
    sub.add_argument(
        "--logit-bias", type=_bias, action="append", default=[], metavar="ID=BIAS", help="added; may be repeated"
    )
    sub.add_argument("--seed", type=_natural, default=0, help="default: 0")
    sub.add_argument("--chunk", type=_natural, help="prompt tokens fed at once; 0 is all (default: the backend's best)")
    sub.add_argument("--max-batch", type=_natural, default=8, help="prompts at work at once; 0 is all (default: 8)")
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    sub.add_argument(
        "--optimized", action=argparse.BooleanOptionalAction, default=True, help="use what `optimize` wrote, if it did"
    )
    sub.add_argument("--threads", type=_natural, default=0, help="of one operator (default: all cores)")
    sub.add_argument("--cuda-graph", action="store_true", help="on a GPU: repeat decoding from a CUDA graph")
    _backend(sub)


def _bench_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", type=Path, metavar="OUT")
    _origin(sub)
    sub.add_argument("--lengths", type=_numbers, default=(128, 1024), help="of prompts and pasts (default: 128,1024)")
    sub.add_argument("--batch", type=_numbers, default=(1,), help="rows at once, as 1,4 (default: 1)")
    sub.add_argument("--rounds", type=_natural, default=5, help="everybody in turn in each (default: 5)")
    sub.add_argument("--sittings", type=_natural, default=1, help="all begin anew, in new processes (default: 1)")
    sub.add_argument("--decoded", type=_natural, default=24, help="tokens after each prompt (default: 24)")
    sub.add_argument("--threads", type=_natural, help="default: one for each core")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch (default: cpu)")
    sub.add_argument("--backends", type=_names, default=(), help="as onnxruntime,tensorrt (default: all that can run)")
    sub.add_argument("--peers", type=_names, default=(), help="genai,optimum: on a RoPE twin of the same shape")
    sub.add_argument("--compare", type=Path, metavar="FILE", help="an older bench.json, to print the speed over its")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="for the report (default: OUT/reports)")
    _lock(sub)


def _origin(sub: argparse.ArgumentParser) -> None:
    for what in ("checkpoint", "adapter"):
        sub.add_argument(f"--{what}", type=Path, help=f"where the {what} is, if it has moved")


def _lock(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--lock-timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS",
        help=f"how long to wait for another command that writes this bundle (default: {TIMEOUT:.0f})",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _inspect_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", type=Path, metavar="PATH")


def _backend(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--backend", metavar="NAME", help="what runs it (default: onnxruntime); a wrong NAME lists all")


def _size(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, numbers = text.partition("=")
    return name, _numbers(numbers)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _natural(text: str) -> int:
    """One whole number in decimal digits."""
    if not DIGITS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not one number from 0 on")
    return int(text)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return _natural(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not ID=BIAS, like 42=-1.5") from None


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(map(DIGITS.fullmatch, parts)):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a list of numbers from 0 on, like 1,64,512")
    return tuple(map(int, parts))


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
    args = parser().parse_args(argv)
    if args.version:
        from fope_export import __version__

        print(f"fope-export {__version__}")
        return PASSED
    if "function" not in args:
        parser().print_help()
        return MISUSED
    try:
        _sweep()
        with _warnings_shown():
            code = perform(args)
        sys.stdout.flush()
    except (FopeError, OSError) as error:
        return _refuse(error, traced=args.traceback)
    except MemoryError:
        return _refuse(FopeError("there is not enough memory for this", hint=SMALLER), traced=args.traceback)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print("this is a mistake of fope-export's: please report it with the lines above", file=sys.stderr)
        return BROKEN
    return code


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """What the package warns of, on stderr."""
    package, shown = logging.getLogger("fope_export"), logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    package.addHandler(shown)
    try:
        yield
    finally:
        package.removeHandler(shown)


def _refuse(error: FopeError | OSError, *, traced: bool) -> int:
    if isinstance(error, OSError):
        _forget_output()
    if traced:
        traceback.print_exc()
        return MISUSED
    from fope_export.terminal import print_error

    hint = "Check the path, its permissions, and the space on the disk."
    print_error(error if isinstance(error, FopeError) else FopeError(str(error), hint=hint))
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
