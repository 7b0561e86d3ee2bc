"""A process that holds one contender: requests as lines of JSON on stdin, answers as lines of JSON on stdout.

What libraries print goes to stderr.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fope_export.benchmark.contenders import CONTENDERS, Job, Loaded
from fope_export.benchmark.greedy import Contender, answer, scores
from fope_export.errors import BackendError
from fope_export.processes import answering

ARRAY = 1 << 26
"""Numbers of the array that memory is measured with: 256 MiB, more than caches hold."""


@dataclass
class Seat:
    """What the process holds."""

    device: str = "cpu"
    loaded: Loaded | None = None

    @property
    def contender(self) -> Contender:
        """Raises BackendError before one was loaded."""
        if self.loaded is None:
            raise BackendError("no contender was loaded", hint="Ask for it first.")
        return self.loaded.contender


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag=str.lower, forbid_unknown_fields=True):
    """One line of stdin. Only what is named in REQUESTS is understood."""


class Prepare(Request, frozen=True, kw_only=True):
    """Run the exporter that a contender has for the twin."""

    job: Job

    def answer(self, seat: Seat) -> dict[str, Any]:  # noqa: ARG002
        prepare = CONTENDERS[self.job.contender].prepare
        assert prepare
        prepare(self.job)
        return {}


class Load(Request, frozen=True, kw_only=True):
    """Make a contender, which the others are asked about."""

    job: Job

    def answer(self, seat: Seat) -> dict[str, Any]:
        torch.set_num_threads(self.job.threads)
        seat.device = self.job.device
        seat.loaded = CONTENDERS[self.job.contender].load(self.job)
        return {"weight_bytes": seat.loaded.weight_bytes}


class Answer(Request, frozen=True, kw_only=True):
    """Decode `new` tokens after each prompt."""

    prompts: list[list[int]]
    new: int

    def answer(self, seat: Seat) -> dict[str, Any]:
        return {"tokens": answer(seat.contender, np.array(self.prompts), self.new).tolist()}


class Scores(Request, frozen=True, kw_only=True):
    """Write the logits of `tokens` after the prompts into a file of numpy's."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    file: str

    def answer(self, seat: Seat) -> dict[str, Any]:
        np.save(self.file, scores(seat.contender, np.array(self.prompts), np.array(self.tokens)))
        return {}


class Time(Request, frozen=True, kw_only=True):
    """Seconds to the first token, seconds for each of the `new` - 1 others, and the peak of memory in bytes, which a
    GPU's libraries do not tell.
    """

    prompts: list[list[int]]
    new: int

    def answer(self, seat: Seat) -> dict[str, Any]:
        ids, contender = np.array(self.prompts), seat.contender
        counted = seat.device == "cpu" and _forget_peak()
        started = time.perf_counter()
        contender.first(ids, self.new)
        reached = time.perf_counter()
        for _ in range(self.new - 1):
            contender.next()
        ended = time.perf_counter()
        seconds = {"first": reached - started, "next": (ended - reached) / (self.new - 1)}
        return seconds | {"peak": _peak() if counted else None}


class Bandwidth(Request, frozen=True, kw_only=True):
    """Bytes a second that torch reads (a sum) and copies (read and written bytes), the best of five."""

    def answer(self, seat: Seat) -> dict[str, Any]:
        source = torch.ones(ARRAY, device=seat.device)
        target = torch.empty_like(source)
        tasks = {"read": (1, source.sum), "copy": (2, lambda: target.copy_(source))}
        return {name: times * source.nbytes / min(map(_seconds, [task] * 5)) for name, (times, task) in tasks.items()}


REQUESTS = msgspec.json.Decoder(Prepare | Load | Answer | Scores | Time | Bandwidth)


def _seconds(task: Any) -> float:
    started = time.perf_counter()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _forget_peak() -> bool:
    """Let the peak of memory count from here; whether the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    """Largest resident memory since it was forgotten, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Answer until stdin ends."""
    seat = Seat()
    with answering() as reply:
        for line in sys.stdin.buffer:
            try:
                reply(REQUESTS.decode(line).answer(seat))
            except Exception as error:  # whatever a library raises is the runner's to tell
                reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})


if __name__ == "__main__":
    main()
