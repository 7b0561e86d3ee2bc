"""What each command takes: one function for each, which adds its options to a parser."""

import argparse
from pathlib import Path
from typing import get_args

from fope_export.deploy import PROMPT, TARGETS
from fope_export.dtypes import DTYPES, FP32, either
from fope_export.lock import TIMEOUT
from fope_export.model.layouts import LAYOUTS
from fope_export.quantizations import (
    CACHES,
    EXACT_CACHE,
    QUANTIZATIONS,
    BlockSize,
    Quantization,
    RoundingName,
    calibrated,
    in_blocks,
)
from fope_export.shipped import NAMES, PASSKEY_NAMES
from fope_export.words import axis, bias, guesses, names, natural, numbers, port, positive, seconds, size


def demo(sub: argparse.ArgumentParser) -> None:
    """Of the models that come along."""
    sub.add_argument("--out", type=Path, default=Path("demo"), help="folder for bundles and report (default: demo)")
    sub.add_argument(
        "--copy", nargs=2, metavar=("NAME", "FOLDER"), help="only copy a checkpoint that comes along to a new FOLDER: "
        f"{', '.join((*NAMES, *PASSKEY_NAMES))}",
    )  # fmt: skip


def doctor(_: argparse.ArgumentParser) -> None:
    """None of its own."""


def export(sub: argparse.ArgumentParser) -> None:
    """Of writing a bundle."""
    sub.add_argument("checkpoint", type=Path, metavar="CKPT", help=f"folder with the checkpoint ({', '.join(LAYOUTS)})")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder for the bundle; one that stands there is replaced")
    sub.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter that PEFT saved, to merge into it")
    sub.add_argument("--dtype", choices=(*DTYPES,), default=FP32.name, help="of weights and activations")
    sub.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="grown, or written in place")
    sub.add_argument(
        "--capacity",
        type=natural,
        metavar="TOKENS",
        help="of a static cache (default: 16 x trained, at most 8192)",
    )
    sub.add_argument("--opset", type=natural, choices=(23, 24), help="ONNX opset (default: 23; 24 for a static cache)")
    sub.add_argument("--extend", choices=("pi", "yarn"), help="change the frequencies for longer contexts")
    sub.add_argument("--extend-to", type=natural, metavar="TOKENS", help="how far (default: 16 x trained, <=8192)")
    sub.add_argument(
        "--fold-padding", action="store_true", help="leave padded channels unrotated, their scale in the projections"
    )
    sub.add_argument("--position-axes", action="store_true", help="position_ids on all of the model's axes, for images")
    sub.add_argument("--inline", action="store_true", help="write the rotation out, for readers without functions")
    sub.add_argument("--layout", choices=("transformers.js",), help="have files lie where that program looks for them")
    sub.add_argument(
        "--quantize", choices=(*QUANTIZATIONS,),
        help=f"linear layers: {'; '.join(map(_quantization, QUANTIZATIONS.values()))} (default: not)",
    )  # fmt: skip
    sub.add_argument(
        "--block", type=natural, choices=get_args(BlockSize), help=f"inputs that share a step ({_usual()})"
    )
    sub.add_argument(
        "--rounding", choices=get_args(RoundingName),
        help="of weights in blocks: to the nearest, or with the layers' inputs on sample text in mind "
        f"(default: compensated for {either(row for row in in_blocks() if row.compensates)} if there is a tokenizer)",
    )  # fmt: skip
    sub.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help=f"text, or ids as .npy or .json, for {either([*calibrated(), *in_blocks()])} (default: Python's own)",
    )  # fmt: skip
    _lock(sub)


def _usual() -> str:
    return "default: " + ", ".join(f"{row.block} for {row.name}" for row in in_blocks())


def _quantization(row: Quantization) -> str:
    return f"{row.name} {row.rounded}, for {'TensorRT' if row.engines else 'ONNX Runtime'}"


def optimize(sub: argparse.ArgumentParser) -> None:
    """Of what a runtime is fastest with."""
    sub.add_argument("bundle", type=Path, metavar="OUT")
    sub.add_argument(
        "--for", dest="target", choices=("onnxruntime", "openvino"), default="onnxruntime",
        help="a file for ONNX Runtime (default), or the folder openvino/, which OpenVINO GenAI opens too",
    )  # fmt: skip
    sub.add_argument(
        "--int8-activations", action=argparse.BooleanOptionalAction, default=True,
        help="round activations too where weights are quantized: several times faster",
    )  # fmt: skip
    sub.add_argument(
        "--cache", choices=(EXACT_CACHE, *CACHES),
        help=f"how the bundle is to keep keys and values (default: as before, and {EXACT_CACHE} at first)",
    )  # fmt: skip
    sub.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="of a rounded cache: text, or token ids as .npy or .json (default: Python's standard library)",
    )  # fmt: skip
    _lock(sub)


def build(sub: argparse.ArgumentParser) -> None:
    """Of engines."""
    sub.add_argument("bundle", type=Path, metavar="OUT")
    sub.add_argument(
        "--target", default="tensorrt-rtx",
        help="tensorrt (for the GPU at hand), tensorrt-rtx, or for GPUs by name tensorrt-rtx:sm86,sm89,sm120 (default)",
    )  # fmt: skip
    sub.add_argument(
        "--plugin", action=argparse.BooleanOptionalAction, default=True, help="the rotation as one fused kernel"
    )
    sub.add_argument("--max-batch", type=natural, default=4, help="rows at once (default: 4)")
    sub.add_argument(
        "--max-length", type=natural, metavar="TOKENS", help="prompt and answer (default: 16 x trained, <=8192)"
    )
    sub.add_argument(
        "--size", type=axis, action="append", default=[], dest="sizes", metavar="NAME=LEAST,BEST,LARGEST",
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


def validate(sub: argparse.ArgumentParser) -> None:
    """Of the proof."""
    sub.add_argument("bundle", type=Path, metavar="OUT")
    _origin(sub)
    sub.add_argument(
        "--lengths", type=numbers, default=(), help="prefill lengths, as 64,512 (default: 1 to 16 x trained)"
    )
    sub.add_argument("--seed", type=natural, default=0, help="of the random tokens (default: 0)")
    sub.add_argument("--stages", action="store_true", help="layer by layer, for models that are larger than memory")
    sub.add_argument("--save-inputs", type=Path, metavar="FILE", help="write the inputs as Polygraphy JSON")
    sub.add_argument("--load-inputs", type=Path, metavar="FILE", help="compare on these inputs instead")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="for the reports (default: OUT/reports)")
    sub.add_argument("--junit", type=Path, metavar="FILE", help="write the JUnit report there too")
    _lock(sub)
    _backend(sub)


def run(sub: argparse.ArgumentParser) -> None:
    """Of generating."""
    sub.add_argument("bundle", type=Path, metavar="OUT")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a batch: one prompt a line, or JSON strings in .jsonl; - is stdin"
    )
    source.add_argument("--prompt-ids", type=numbers, help="token ids to continue, as 12,7,99")
    source.add_argument(
        "--messages", type=Path, metavar="FILE", help='a chat: JSON, [{"role": "user", "content": "..."}, ...]'
    )
    sub.add_argument("--chat", action="store_true", help="each prompt is a user's message, put into the chat template")
    sub.add_argument("--system", metavar="TEXT", help="of a chat: its first message, of the system")
    sub.add_argument("--max-new-tokens", type=natural, default=128, help="default: 128")
    sub.add_argument("--min-new-tokens", type=natural, default=0, help="no end before as many (default: 0)")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="answers are JSON by this schema")
    form.add_argument("--regex", metavar="EXPRESSION", help="answers match it, in Rust's syntax")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="answers follow this grammar, in Lark's syntax")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sub.add_argument("--top-k", type=natural, default=0, help="draw from the k likeliest tokens; 0 is all (default)")
    sub.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens that reach p (default: 1)")
    sub.add_argument("--min-p", type=float, default=0.0, help="leave out tokens below p times the likeliest's odds")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 against tokens that came before")
    sub.add_argument("--presence-penalty", type=float, default=0.0, help="taken from logits of tokens in the answer")
    sub.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, as often as they are there")
    sub.add_argument(
        "--logit-bias", type=bias, action="append", default=[], metavar="ID=BIAS", help="added; may be repeated"
    )
    sub.add_argument("--seed", type=natural, default=0, help="default: 0")
    sub.add_argument("--chunk", type=natural, help="prompt tokens fed at once; 0 is all (default: the backend's best)")
    sub.add_argument("--max-batch", type=natural, default=8, help="prompts at work at once; 0 is all (default: 8)")
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    sub.add_argument(
        "--optimized", action=argparse.BooleanOptionalAction, default=True, help="use what `optimize` wrote, if it did"
    )
    sub.add_argument("--threads", type=natural, default=0, help="of one operator (default: all cores)")
    sub.add_argument("--cuda-graph", action="store_true", help="on a GPU: repeat decoding from a CUDA graph")
    _speculation(sub, "auto")
    _backend(sub)


def serve(sub: argparse.ArgumentParser) -> None:
    """Of the server."""
    sub.add_argument("bundles", type=Path, nargs="+", metavar="OUT", help="one bundle or several")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    sub.add_argument("--port", type=port, default=8000, help="0 takes a free one (default: 8000)")
    sub.add_argument("--served-model-name", nargs="+", metavar="NAME", help="for each bundle (default: its folder's)")
    sub.add_argument("--slots", type=positive, default=8, help="answers at once, of each bundle (default: 8)")
    sub.add_argument(
        "--max-model-len",
        type=positive,
        metavar="TOKENS",
        help="a prompt with its answer (default: 16 x trained, or 8192)",
    )
    sub.add_argument(
        "--max-queued", type=natural, default=256, metavar="N", help="requests that may wait (default: 256)"
    )
    sub.add_argument(
        "--max-queued-tokens", type=natural, metavar="N", help="tokens of their prompts (default: no bound)"
    )
    sub.add_argument(
        "--prefix-cache",
        type=size,
        default=0,
        metavar="SIZE",
        help="keys and values kept of what was asked, as 512M or 2G",
    )
    sub.add_argument(
        "--chunk", type=natural, help="prompt tokens fed between steps (default: the backend's best, 512 at most)"
    )
    sub.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="the key that every request but health must send"
    )
    sub.add_argument(
        "--drain", type=seconds, default=30.0, metavar="SECONDS", help="to finish at SIGTERM (default: 30)"
    )
    sub.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="a page that may ask; may be repeated"
    )
    sub.add_argument(
        "--batch-invariant", action="store_true", help="alike to the last bit in any company; each step runs all slots"
    )
    _speculation(sub, "off")
    sub.add_argument("--unvalidated", action="store_true", help="serve what no report says is right")
    sub.add_argument("--report", type=Path, metavar="DIR", help="where the report is (default: in the bundle)")
    sub.add_argument("--threads", type=natural, default=0, help="of one operator (default: all cores)")
    _backend(sub)


def deploy(sub: argparse.ArgumentParser) -> None:
    """Of handing over."""
    sub.add_argument("bundle", type=Path, metavar="OUT")
    sub.add_argument("out", type=Path, metavar="DEST", help="the folder to write; it must be free")
    what = "; ".join(f"{name}: {text}" for name, text in TARGETS.items())
    sub.add_argument("--target", required=True, choices=TARGETS, help=what)
    sub.add_argument("--served-model-name", metavar="NAME", help="what it is called there (default: its folder's name)")
    sub.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"what DEST/check asks (default: {PROMPT!r})")
    sub.add_argument("--unvalidated", action="store_true", help="hand over what no report says is right")
    sub.add_argument("--report", type=Path, metavar="DIR", help="where the report is (default: in the bundle)")
    _lock(sub)
    _backend(sub)


def bench(sub: argparse.ArgumentParser) -> None:
    """Of timing."""
    sub.add_argument("bundle", type=Path, metavar="OUT")
    _origin(sub)
    sub.add_argument("--lengths", type=numbers, default=(128, 1024), help="of prompts and pasts (default: 128,1024)")
    sub.add_argument("--batch", type=numbers, default=(1,), help="rows at once, as 1,4 (default: 1)")
    sub.add_argument("--rounds", type=natural, default=5, help="everybody in turn in each (default: 5)")
    sub.add_argument("--sittings", type=natural, default=1, help="all begin anew, in new processes (default: 1)")
    sub.add_argument("--decoded", type=natural, default=24, help="tokens after each prompt (default: 24)")
    sub.add_argument("--threads", type=natural, help="default: one for each core")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch (default: cpu)")
    sub.add_argument("--backends", type=names, default=(), help="as onnxruntime,tensorrt (default: all that can run)")
    sub.add_argument(
        "--peers",
        type=names,
        default=(),
        help="genai,optimum,openvino,llamacpp: on a RoPE twin of the same shape",
    )
    sub.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="time this contender alone; may be repeated"
    )
    sub.add_argument("--compare", type=Path, metavar="FILE", help="an older bench.json, to print the speed over its")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="for the report (default: OUT/reports)")
    _lock(sub)


def evaluate(sub: argparse.ArgumentParser) -> None:
    """Of loss and passkeys by length."""
    sub.add_argument("bundle", type=Path, metavar="OUT")
    sub.add_argument("--against", type=Path, metavar="TWIN", help="another bundle, measured alike beside it")
    sub.add_argument("--lengths", type=numbers, default=(), help="of contexts in tokens (default: 1 to 16 x trained)")
    sub.add_argument("--data", type=Path, metavar="FILE", help="text in UTF-8 (default: Python's own, held out)")
    sub.add_argument("--trials", type=natural, default=10, help="passkeys at each length and depth (default: 10)")
    sub.add_argument("--seed", type=natural, default=0, help="of the keys and their places (default: 0)")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="for the report (default: OUT/reports)")
    _lock(sub)
    _backend(sub)


def check(sub: argparse.ArgumentParser) -> None:
    """Of bundles as they are."""
    sub.add_argument("paths", type=Path, metavar="PATH", nargs="+", help="a bundle, or a file in one")


def report(sub: argparse.ArgumentParser) -> None:
    """Of what is done with reports."""
    sub.add_argument("what", choices=("compare", "summary"), help="two of a kind beside each other, or one as Markdown")
    sub.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="REPORT",
        help="parity.json or the like, or a folder with it",
    )


def _origin(sub: argparse.ArgumentParser) -> None:
    for what in ("checkpoint", "adapter"):
        sub.add_argument(f"--{what}", type=Path, help=f"where the {what} is, if it has moved")


def _lock(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--lock-timeout", type=seconds, default=TIMEOUT, metavar="SECONDS",
        help=f"how long to wait for another command that writes this bundle (default: {TIMEOUT:.0f})",
    )  # fmt: skip


def _speculation(sub: argparse.ArgumentParser, usual: str) -> None:
    sub.add_argument(
        "--speculate", type=guesses, metavar="auto|off|N",
        help=f"guess tokens and look at them together: as many as pay, none, at most N a step (default: {usual})",
    )  # fmt: skip
    sub.add_argument("--draft", type=Path, metavar="BUNDLE", help="a smaller model on the same tokens, which guesses")


def inspect(sub: argparse.ArgumentParser) -> None:
    """Of describing."""
    sub.add_argument("path", type=Path, metavar="PATH")


def _backend(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--backend",
        metavar="NAME",
        help="what runs it; a wrong NAME lists all (default: for run and serve the fastest here, for validate all)",
    )
