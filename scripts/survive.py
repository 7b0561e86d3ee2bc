#!/usr/bin/env python
"""Kill commands at random moments, and let two write at once, and see whether bundles survive.

    scripts/survive.py --kills 200 --terminations 100 --rounds 50

A kill (-9) or a termination falls into export (of a new bundle, and over an old one), optimize, build and validate of
a small checkpoint, in turn. Then OUT must be absent or open with all hashes, no child process may live, and after the
next command nothing may be left: beside OUT, in it, in the temporary folder, in the cache. In a round, two commands
write into one bundle at once, each in a process namespace of its own (needs root), where both may have the same process
id: what those that exit 0 wrote must be there. Exit code 1, with what was seen, where one of that does not hold.

Commands are forked from a process that has everything imported, so that moments fall into work and not into imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import combinations_with_replacement, cycle, islice
from pathlib import Path

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
PATIENCE = 10.0
"""Seconds within which children must have followed their parent."""
KEPT = ("timing-", ".ses")
"""Timing caches, and a file that every process with ONNX Runtime in it writes, killed or not."""
REPORT = "reports/parity.json"
PLANS = {"build 89": "engines/tensorrt-rtx-sm89.plan", "build 120": "engines/tensorrt-rtx-sm120.plan"}
PRODUCTS = {"export": "model.onnx", "optimize": "model.ort.onnx", "validate": REPORT, **PLANS}
"""Each command, and a file that it writes."""


def command(name: str, checkpoint: Path, out: Path) -> list[str]:
    """The arguments of a command of PRODUCTS."""
    verb, _, architecture = name.partition(" ")
    more = {
        "export": [str(checkpoint), str(out)],
        "optimize": [str(out)],
        "validate": [str(out), "--lengths", "8"],
        "build": [str(out), "--no-plugin", "--target", f"tensorrt-rtx:sm{architecture}"],
    }
    return [verb, *more[verb]]


class Server:
    """A process with everything imported that forks one command at a time, in `folder` for its temporary files."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.temporary, self.log = folder / "tmp", folder / "log"
        self.temporary.mkdir(parents=True)
        self.token = str(folder)
        environ = os.environ | {"TMPDIR": str(self.temporary), "FOPE_EXPORT_CACHE": str(folder / "cache")}
        told = [*prefix, sys.executable, __file__, "--serve", self.token]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(told, stdin=pipe, stdout=pipe, text=True, env=environ)
        assert self._process.stdin and self._process.stdout
        self._asked, self._told = self._process.stdin, self._process.stdout

    def start(self, arguments: list[str]) -> int:
        """Fork a command; its process id."""
        self._asked.write(json.dumps([str(self.log), arguments]) + "\n")
        self._asked.flush()
        return int(self._told.readline())

    def wait(self) -> int:
        """The exit code, negative after a signal."""
        return int(self._told.readline())

    def run(self, arguments: list[str]) -> int:
        self.start(arguments)
        return self.wait()

    def children(self) -> list[str]:
        """Command lines of living processes that commands started."""
        alive, deadline = [""], time.monotonic() + PATIENCE
        while alive and time.monotonic() < deadline:
            alive = list(_marked(f"SURVIVE={self.token}"))
            time.sleep(0.05)
        return alive

    def close(self) -> None:
        self._asked.close()
        self._process.wait()


def _marked(text: str) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if text.encode() in (process / "environ").read_bytes().split(b"\0"):
                yield (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()


def serve(token: str) -> None:
    """Fork what is asked for on stdin; tell its process id, then its exit code."""
    from fope_export.cli import main

    for line in sys.stdin:
        log, arguments = json.loads(line)
        child = os.fork()
        if not child:
            os.environ["SURVIVE"] = token
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            null = os.open(os.devnull, os.O_RDONLY)
            for number, target in ((null, 0), (file, 1), (file, 2)):
                os.dup2(number, target)
            sys.exit(main(arguments))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Trial:
    """One checkpoint, one OUT, and what must hold of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.home, self.out, self.checkpoint = folder / "home", folder / "home" / "out", folder / "checkpoint"
        self.home.mkdir()
        self.random = random.Random(seed)
        self.faults: list[str] = []
        write_checkpoint(self.checkpoint)

    def arguments(self, name: str) -> list[str]:
        return command(name, self.checkpoint, self.out)

    def expect(self, holds: object, what: str) -> None:
        if not holds:
            self.faults.append(what)
            print(f"FAULT: {what}", flush=True)

    def whole(self, what: str) -> dict[str, str]:
        """The files of OUT, which must open; none where it is absent."""
        from fope_export.bundle import Bundle
        from fope_export.errors import BundleError

        try:
            return Bundle.open(self.out).manifest.files if self.out.exists() else {}
        except BundleError as cause:
            self.expect(False, f"{what}: {cause}")
            return {}

    def clean(self, servers: list[Server], what: str) -> None:
        """Nothing is left by anybody."""
        listed = self.whole(what).keys() | {"fope_export.json"}
        present = {path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if path.is_file()}
        self.expect(present == listed, f"{what}: in OUT {sorted(present ^ listed)}")
        beside = [path.name for path in self.home.iterdir() if path != self.out]
        self.expect(not beside, f"{what}: beside OUT {beside}")
        for server in servers:
            folders = (server.temporary, server.temporary.with_name("cache"))
            left = [p.name for f in folders if f.exists() for p in f.iterdir() if not p.name.startswith(KEPT)]
            self.expect(not left, f"{what}: temporary {left}")


def write_checkpoint(folder: Path) -> None:
    """Two layers with random weights, in the native layout."""
    from fope_export.config import ModelConfig
    from fope_export.fope.rotary import FopeRotary
    from fope_export.model.decoder import Decoder
    from fope_export.model.layouts.native import save
    from fope_export.tokens import byte_tokenizer

    rotary = FopeRotary.create(head_dim=16, groups=2, training_length=32)
    config = ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, norm_eps=1e-6,
        tie_embeddings=False, training_length=32, rope_theta=1e4, floored=True, eos_token_id=0, pad_token_id=0,
        spectrum=rotary.config,
    )  # fmt: skip
    model = Decoder(config).eval().requires_grad_(False)
    for attention in model.attentions():
        attention.rotary = FopeRotary.from_spectrum(rotary.spectrum)
    folder.mkdir()
    save(model, folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())


def interrupt(trial: Trial, server: Server, number: signal.Signals, count: int) -> int:
    """End `count` commands by a signal; how many it reached."""
    seconds: dict[str, float] = {}
    reached = 0
    for i, name in enumerate(islice(cycle(["fresh", "export", "optimize", "build 89", "validate"]), count)):
        if name == "fresh":
            shutil.rmtree(trial.out, ignore_errors=True)
        elif not trial.out.exists():
            server.run(trial.arguments("export"))
        arguments = trial.arguments("export" if name == "fresh" else name)
        if name not in seconds:
            started = time.monotonic()
            trial.expect(server.run(arguments) == 0, f"{name}: {server.log.read_text()[-500:]}")
            seconds[name] = time.monotonic() - started
            if name == "fresh":
                shutil.rmtree(trial.out)
        process = server.start(arguments)
        time.sleep(seconds[name] * trial.random.uniform(0, 1))
        with suppress(ProcessLookupError):
            os.kill(process, number)
        code = server.wait()
        what = f"{number.name} {i}, {name} (exit {code})"
        reached += code in (-number, 128 + number)
        trial.expect(code in (-number, 128 + number, 0), f"{what}: {server.log.read_text()[-500:]}")
        trial.expect(not (alive := server.children()), f"{what}: alive {alive}")
        trial.whole(what)
        then = "optimize" if trial.out.exists() else "export"
        trial.expect(server.run(trial.arguments(then)) == 0, f"{what}, then {then}: {server.log.read_text()[-500:]}")
        trial.clean([server], what)
    return reached


def together(trial: Trial, servers: list[Server], count: int) -> dict[str, int]:
    """Two writers at once, `count` times; how often each pair of exit codes came."""
    seen: dict[str, int] = {}
    pairs = list(combinations_with_replacement(PRODUCTS, 2))
    trial.random.shuffle(pairs)
    for i, pair in enumerate(islice(cycle(pairs), count)):
        trial.expect(servers[0].run(trial.arguments("export")) == 0, f"export: {servers[0].log.read_text()[-500:]}")
        for server, name in zip(servers, pair, strict=True):
            server.start(trial.arguments(name))
            time.sleep(trial.random.uniform(0, 0.5))
        codes = [server.wait() for server in servers]
        what = f"round {i}, {' beside '.join(pair)}, exits {codes}"
        files = trial.whole(what)
        for server, name, code in zip(servers, pair, codes, strict=True):
            trial.expect(code in (0, 2), f"{what}: {server.log.read_text()[-500:]}")
            lost = code == 0 and PRODUCTS[name] not in files and "export" not in pair
            trial.expect(not lost, f"{what}: {PRODUCTS[name]} is lost")
        trial.expect(0 in codes, f"{what}: nobody wrote")
        trial.clean(servers, what)
        seen[str(codes)] = seen.get(str(codes), 0) + 1
    return seen


@contextmanager
def running(folder: Path, names: list[str], prefix: tuple[str, ...] = ()) -> Iterator[list[Server]]:
    servers = [Server(folder / name, prefix) for name in names]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terminations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="of two writers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", metavar="TOKEN", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trial = Trial(folder, args.seed)
        if args.kills or args.terminations:
            with running(folder, ["alone"]) as (server,):
                for number, count in ((signal.SIGKILL, args.kills), (signal.SIGTERM, args.terminations)):
                    reached = interrupt(trial, server, number, count)
                    print(f"{count} x {number.name}: {reached} before the command's end", flush=True)
        if args.rounds:
            with running(folder, ["left", "right"], NAMESPACE) as servers:
                seen = together(trial, servers, args.rounds)
                print(f"{args.rounds} rounds of two writers: exit codes {seen}", flush=True)
    print(f"{len(trial.faults)} faults")
    return bool(trial.faults)


if __name__ == "__main__":
    sys.exit(main())
