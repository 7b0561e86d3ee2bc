#!/usr/bin/env python
"""Measure export and `validate --stages` of a model that is large beside memory: peak memory of all processes, and time
against that of reading and hashing the checkpoint once and writing and hashing as many bytes as the bundle has.

    scripts/bench_stream.py --size 200MB --dtype bf16 --folder /tmp     what CI does: fails where a bound is passed
    scripts/bench_stream.py --size 24GB --dtype bf16 --folder DISK      12 billion parameters, 50 GB of disk

The checkpoint is random, in bfloat16, in Hugging Face's layout with FoPE, a shard for each layer; it is made layer by
layer and removed at the end, as all else is. Memory is RssAnon + RssShmem, added over the command's processes; pages of
mapped files, which the system takes back when it needs them, are stated apart.

The bound of CI follows from the model: what a model of as many layers that are 64 wide takes, and beyond that its two
largest tensors in the export's dtype (one is made while one is written), and 64 MiB for the pieces they are made in.

All threads but one are left to others: many that wait for each other on a busy machine take several times as long.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fope_export.backends.machine import read_machine
from fope_export.bench_report import processor
from fope_export.dtypes import DTYPES
from fope_export.model.layouts import hugging_face
from fope_export.scratch import scratch

RESULTS = Path(__file__).parent / "results" / "bench_stream.jsonl"
SIZES: dict[str, dict[str, int]] = {
    "200MB": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 8192},
    "2GB": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "vocab_size": 32768},
    "6GB": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 32768},
    "24GB": {"hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 38, "vocab_size": 131072},
}
HEAD_DIM, SHARED = 128, 4
"""Channels of a head, and query heads that share one of keys and values."""
NARROW = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256, "head_dim": 16}
BLOCK = 1 << 20
SPARE = 1.1
"""Of the disk that is needed, asked for before anything is made."""
FOR_PIECES = 64 << 20
PAUSE = 0.02
"""Seconds between two looks at memory."""


def config_of(size: str, **other: int) -> dict[str, Any]:
    """The fields of a config.json."""
    sizes = SIZES[size] | {"head_dim": HEAD_DIM} | other
    heads = sizes["hidden_size"] // sizes["head_dim"]
    return sizes | {
        "model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": max(heads // SHARED, 1),
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "eos_token_id": 0,
        "rope_parameters": {"rope_theta": 10_000.0, "fope_init_factor": 0.1, "fope_sep_head": False},
    }  # fmt: skip


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape, in the order of the layers."""
    weight_map = hugging_face.weight_map_of(config)
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows = {
        "embed_tokens": config["vocab_size"], "lm_head": config["vocab_size"], "q_proj": width, "o_proj": width,
        "k_proj": config["num_key_value_heads"] * head_dim, "v_proj": config["num_key_value_heads"] * head_dim,
        "up_proj": inner, "gate_proj": inner, "down_proj": width,
    }  # fmt: skip
    spectrum = weight_map.config.spectrum
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (name for names in weight_map.sources.values() for name in names):
        kind = name.split(".")[-2]
        if name.endswith("_coef"):
            shapes[name] = (spectrum.frequencies, spectrum.pairs)
        else:
            shapes[name] = (rows[kind], inner if kind == "down_proj" else width) if kind in rows else (width,)
    return shapes


def drawn(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Tensor:
    """Random numbers that keep activations at about the size of one: of either sign, between a power of two and the
    next.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("_coef"):
        noise: Tensor = torch.from_numpy(random.standard_normal(shape, np.float32)) / shape[0] ** 0.5
        return torch.eye(*shape) + 0.1 * noise
    power = int(math.log2(shape[1]) / -2 - 1) + 127
    bits = random.integers(0, 1 << 64, -(-math.prod(shape) // 4), np.uint64).view(np.uint16)[: math.prod(shape)]
    bits &= 0x807F  # sign and mantissa
    bits |= power << 7
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(shape)


def write_checkpoint(config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """A shard for each layer and one for the rest of each end; numbers of parameters, and of those of the decoder's two
    largest tensors.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[str, list[str]] = {}
    shapes = tensors_of(config)
    for name in shapes:
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"layer-{layer[1]}" if layer else name.removesuffix(".weight"), []).append(name)
    random, where = np.random.Generator(np.random.SFC64(0)), dict[str, str]()
    for number, names in enumerate(shards.values()):
        file = f"model-{number:05}.safetensors"
        save_file({name: drawn(name, shapes[name], random) for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    return sum(sizes), sum(sorted((*sizes, 2 * config["hidden_size"] * config["intermediate_size"]))[-2:])


def processes(root: int) -> Iterator[int]:
    """A process and all that it has started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended
            if path.name.isdigit():
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                parents.setdefault(int(parent), []).append(int(path.name))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return iter(found)


class Memory(Thread):
    """Looks at the memory of a process and its children until it is told that there is no more: peaks in bytes."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root, self._over, self.peak, self.mapped = root, Event(), 0, 0

    def run(self) -> None:
        while not self._over.wait(PAUSE):
            own, mapped = 0, 0
            for process in processes(self._root):
                with suppress(OSError):
                    lines = Path(f"/proc/{process}/status").read_text().splitlines()
                    status = dict(line.split(":", 1) for line in lines)
                    anonymous, shared, file = (
                        int(status.get(kind, "0").split()[0]) << 10 for kind in ("RssAnon", "RssShmem", "RssFile")
                    )
                    own, mapped = own + anonymous + shared, mapped + file
            self.peak, self.mapped = max(self.peak, own), max(self.mapped, mapped)

    def end(self) -> None:
        self._over.set()
        self.join()


def measured(*arguments: str, checkout: Path | None = None) -> dict[str, Any]:
    """Run a command of fope-export, or of the one in another `checkout`: how long it took, and what it held."""
    started = time.perf_counter()
    command, alone = [sys.executable, "-m", "fope_export", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    alone |= {"PYTHONPATH": str(checkout)} if checkout else {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=alone)
    memory = Memory(process.pid)
    memory.start()
    try:
        status = process.wait()
    finally:
        process.kill()
        memory.end()
    if status:
        raise SystemExit(f"fope-export {' '.join(arguments)}: exit {status}")
    seconds = time.perf_counter() - started
    found = {"seconds": round(seconds, 1), "peak_MiB": memory.peak >> 20, "mapped_MiB": memory.mapped >> 20}
    print(arguments[0], found, file=sys.stderr, flush=True)
    return found


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of a folder's files, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(source: Path, copy: Path, itemsize: int) -> float:
    """Seconds to read and hash a checkpoint of bfloat16, and to write and hash a file of as many numbers of a size."""
    started, read, written = time.perf_counter(), hashlib.sha256(), hashlib.sha256()
    with copy.open("wb", buffering=0) as target:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    read.update(block)
                    for _ in range(itemsize // 2):
                        written.update(block)
                        target.write(block)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    copy.unlink()
    print(f"plain {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds


def measure(size: str, dtype: str, folder: Path, *, stages: bool) -> dict[str, Any]:
    """Everything, in one run; the folder is another's to empty."""
    config = config_of(size)
    parameters, largest = write_checkpoint(config, folder / "checkpoint")
    write_checkpoint(config_of(size, **NARROW), folder / "narrow")
    base = measured("export", str(folder / "narrow"), str(folder / "narrow-out"), "--dtype", dtype)
    forget(folder / "checkpoint")
    seconds = plain(folder / "checkpoint", folder / "plain", DTYPES[dtype].itemsize)
    forget(folder / "checkpoint")
    export = measured("export", str(folder / "checkpoint"), str(folder / "out"), "--dtype", dtype)
    validated = measured("validate", str(folder / "out"), "--stages") if stages else None
    return {
        "load": round(os.getloadavg()[1], 1),
        "size": size, "dtype": dtype, "parameters": parameters, "layers": config["num_hidden_layers"],
        "two_largest_tensors": largest, "narrow": base, "plain_seconds": round(seconds, 1), "export": export,
        "export_over_plain": round(export["seconds"] / seconds, 2), "stages": validated,
        "bound_MiB": base["peak_MiB"] + (DTYPES[dtype].itemsize * largest + FOR_PIECES >> 20),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="200MB", help="of the checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the export")
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for checkpoint and bundle")
    parser.add_argument("--stages", action=argparse.BooleanOptionalAction, default=True, help="validate, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a line of JSON is added to it")
    args = parser.parse_args()
    numbers = sum(torch.Size(shape).numel() for shape in tensors_of(config_of(args.size)).values())
    needed = SPARE * numbers * (2 + DTYPES[args.dtype].itemsize)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is removed then, too
    args.folder.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(args.folder)
    if (free := status.f_bavail * status.f_frsize) < needed:
        raise SystemExit(f"{args.folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    with scratch(args.folder) as folder:
        record = measure(args.size, args.dtype, folder, stages=args.stages)
    machine = msgspec.to_builtins(read_machine()) | {"processor": processor()}
    with args.out.open("a") as file:
        file.write(json.dumps(record | {"machine": machine}) + "\n")
    print(json.dumps(record, indent=2))
    if record["export"]["peak_MiB"] > record["bound_MiB"]:
        print(f"export held {record['export']['peak_MiB']} MiB, more than {record['bound_MiB']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
