"""Try damaged inputs on every command that reads files, and say which were not refused cleanly.

    scripts/fuzz.py --seed 1 --count 1000 [--jobs 2] [--only 17]

An input is clean where the program ends with 0 or 2 (validate also with 1, when it has said FAILED), with one message
under 2,000 characters and no traceback, within 60 seconds and 2 GiB, and writes nothing outside of OUT. The same seed
gives the same inputs; `--only` tries one of them again and shows what was said. Every kind has the same share. Most
inputs run in forks of one process that has imported everything, every twentieth in a process of its own.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}

from fuzz_kinds import KINDS
from fuzz_sources import Place, make_sources

SECONDS, MEMORY, MESSAGE = 60.0, 2 << 30, 2000
REAL = 20
"""Every so many inputs run in a process of their own."""
CACHES = ("home/.cache/", "tmp/.ses")
"""Where libraries keep what they know of the machine, whatever the input: fonts, ONNX Runtime's id of the device."""
IMPORTED = (
    "fope_export.cli", "fope_export.commands", "fope_export.graph.export", "fope_export.graph.optimize",
    "fope_export.inspection", "fope_export.parity.run", "fope_export.report", "fope_export.generation",
    "fope_export.tensorrt.build", "fope_export.terminal", "fope_export.tokens", "onnxruntime",
)  # fmt: skip


@dataclass
class Trial:
    """One input at work. `before` is what lay outside of OUT."""

    number: int
    kind: str
    place: Place
    argv: list[str]
    pid: int
    started: float
    before: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Outcome:
    """What came of it. `faults` says what was not clean."""

    trial: Trial
    code: int
    seconds: float
    memory: int
    said: str
    faults: list[str]


def listing(place: Place) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a place that is not in OUT."""
    files = {}
    for folder, _, names in os.walk(place.root):
        if Path(folder) == place.out or place.out in Path(folder).parents or Path(folder) == place.logs:
            continue
        for name in names:
            entry, known = Path(folder, name).lstat(), str(Path(folder, name).relative_to(place.root))
            if not known.startswith(CACHES):
                files[known] = entry.st_size, entry.st_mtime_ns
    return files


def start(args: argparse.Namespace, number: int, root: Path, sources: Path) -> Trial:
    """Damage an input and start the program on it."""
    kind = args.kind or list(KINDS)[number % len(KINDS)]
    place = Place(root / str(number), sources)
    argv = KINDS[kind](random.Random(f"{args.seed} {number}"), place)
    before = listing(place)
    pid = (spawn if number % REAL == REAL - 1 else fork)(argv, place)
    return Trial(number, kind, place, argv, pid, time.monotonic(), before)


def environment(place: Place) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(place.root / "tmp"), "HOME": str(place.root / "home")}


def spawn(argv: list[str], place: Place) -> int:
    """A process of its own."""
    command = [sys.executable, "-m", "fope_export.cli", *argv]
    with (place.logs / "out").open("wb") as out, (place.logs / "err").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=place.root, env=environment(place), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
    process.returncode = 0  # it is waited for by its id, with what it used
    return process.pid


def fork(argv: list[str], place: Place) -> int:
    """A copy of this process, which has no threads."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(place.root)
        os.environ.update(environment(place))
        tempfile.tempdir = None
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place.logs / name, os.O_WRONLY | os.O_CREAT), number)
        from fope_export.cli import main

        code = main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if kept := getattr(sys.modules.get("fope_export.scratch"), "KEPT", None):
            kept.clear()  # as at the end of Python, which this end passes over
        os._exit(code)


def finished(trial: Trial, limit: float) -> Outcome | None:
    """What came of a trial, where it has ended or its time is over."""
    pid, status, used = os.wait4(trial.pid, os.WNOHANG)
    seconds, hung = time.monotonic() - trial.started, False
    if not pid:
        if seconds < limit:
            return None
        hung = True
        os.killpg(trial.pid, signal.SIGKILL)
        _, status, used = os.wait4(trial.pid, 0)
    try:
        os.killpg(trial.pid, signal.SIGKILL)
        orphans = not hung
    except ProcessLookupError:
        orphans = False
    said = (trial.place.logs / "err").read_bytes().decode(errors="replace")
    printed = (trial.place.logs / "out").read_bytes().decode(errors="replace")
    code, memory = os.waitstatus_to_exitcode(status), used.ru_maxrss << 10
    faults = [
        *([f"hangs for {limit:.0f} s"] if hung else faults_of(trial, code, said, printed)),
        *([f"takes {memory >> 20} MiB"] if memory > MEMORY else []),
        *(["leaves a process behind"] if orphans else []),
        *(f"outside of OUT: {name}" for name in changes(trial)),
    ]
    return Outcome(trial, code, seconds, memory, said, faults)


def faults_of(trial: Trial, code: int, said: str, printed: str) -> list[str]:
    """What is wrong with how a program ended, and with what it said."""
    failed = code == 1 and trial.argv[0] == "validate" and "FAILED" in printed
    told = said.count("error: ")
    wrong = {
        f"exit code {code}": code not in (0, 2) and not failed,
        f"traceback: {last_line(said)}": "Traceback (most recent" in said,
        f"a message of {len(said)} characters": len(said) >= MESSAGE,
        f"{told} messages": code == 2 and told != 1,
        "no next step": code == 2 and "hint: " not in said and "usage: " not in said,
    }
    return [fault for fault, seen in wrong.items() if seen]


def last_line(said: str) -> str:
    """Of a traceback: the exception."""
    lines = said.partition("Traceback (most recent")[2].splitlines()[1:]
    return next((line[:200] for line in lines if line and not line.startswith(" ")), "")


def changes(trial: Trial) -> list[str]:
    """Files outside of OUT that came, went or changed."""
    after, before = listing(trial.place), trial.before
    names = sorted(name for name in after.keys() | before.keys() if after.get(name) != before.get(name))
    half = [path.name for path in trial.place.root.iterdir() if path.name.startswith(f".{trial.place.out.name}.")]
    return names + half


def run(args: argparse.Namespace, root: Path) -> list[Outcome]:
    """Every input, `jobs` at a time."""
    for name in IMPORTED:
        __import__(name)
    sources = root / "sources"
    if not (child := os.fork()):  # this process never computes, so that it has no threads
        make_sources(sources)
        os._exit(0)
    os.waitpid(child, 0)
    waiting = [args.only] if args.only is not None else list(range(args.count))[::-1]
    working: list[Trial] = []
    outcomes: list[Outcome] = []
    while waiting or working:
        while waiting and len(working) < args.jobs:
            working.append(start(args, waiting.pop(), root, sources))
        for trial in list(working):
            if outcome := finished(trial, args.seconds):
                working.remove(trial)
                outcomes.append(outcome)
                tell(outcome, wordy=args.only is not None)
                trial.place.remove()
        time.sleep(0.01)
    return outcomes


def tell(outcome: Outcome, *, wordy: bool) -> None:
    """A line for an input that was not clean; everything for one that is looked at alone."""
    trial = outcome.trial
    if outcome.faults or wordy:
        print(
            f"{trial.number:5} {trial.kind}: {' '.join(trial.argv)}: {'; '.join(outcome.faults) or 'clean'}", flush=True
        )
    if wordy:
        print(f"exit code {outcome.code}, {outcome.seconds:.1f} s, {outcome.memory >> 20} MiB\n{outcome.said}")


def summary(outcomes: list[Outcome]) -> None:
    """What was seen by kind."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        kinds[outcome.trial.kind]["not clean" if outcome.faults else f"exit {outcome.code}"] += 1
    for kind, counts in kinds.items():
        print(f"{kind:28} {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}")
    unclean = sum(bool(outcome.faults) for outcome in outcomes)
    longest, largest = max(o.seconds for o in outcomes), max(o.memory for o in outcomes)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(outcomes)} inputs, {unclean} not clean; longest {longest:.1f} s, largest {largest >> 20} MiB, "
        f"{used.ru_utime + used.ru_stime:.0f} s of processors in all"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="inputs at a time (default: 2)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this input alone, with all it said")
    parser.add_argument("--kind", choices=list(KINDS), help="this kind alone (default: all in equal shares)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which an input hangs (default: 60)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        outcomes = run(args, Path(folder))
    summary(outcomes)
    return int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
