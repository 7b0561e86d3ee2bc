"""A process that holds one contender: requests as lines of JSON on stdin, answers as lines of JSON on stdout.

What libraries print goes to stderr.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fope_export.benchmark.contenders import CONTENDERS, Job, Loaded
from fope_export.benchmark.greedy import answer, scores

ARRAY = 1 << 26
"""Numbers of the array that memory is measured with: 256 MiB, more than caches hold."""


class Answers:
    """One method for each request."""

    _device = "cpu"

    def prepare(self, job: dict[str, Any]) -> dict[str, Any]:
        known = msgspec.convert(job, Job)
        prepare = CONTENDERS[known.contender].prepare
        assert prepare
        prepare(known)
        return {}

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        known = msgspec.convert(job, Job)
        torch.set_num_threads(known.threads)
        self._device = known.device
        self._loaded: Loaded = CONTENDERS[known.contender].load(known)
        return {"weight_bytes": self._loaded.weight_bytes}

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        return {"tokens": answer(self._loaded.contender, np.array(prompts), new).tolist()}

    def scores(self, prompts: list[list[int]], tokens: list[list[int]], file: str) -> dict[str, Any]:
        """Logits, into a file of numpy's."""
        np.save(file, scores(self._loaded.contender, np.array(prompts), np.array(tokens)))
        return {}

    def time(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Seconds to the first token, seconds for each of the `new` - 1 others, and the peak of memory in bytes, which
        a GPU's libraries do not tell.
        """
        ids, contender = np.array(prompts), self._loaded.contender
        counted = self._device == "cpu" and _forget_peak()
        started = time.perf_counter()
        contender.first(ids, new)
        reached = time.perf_counter()
        for _ in range(new - 1):
            contender.next()
        ended = time.perf_counter()
        return {"first": reached - started, "next": (ended - reached) / (new - 1), "peak": _peak() if counted else None}

    def bandwidth(self) -> dict[str, Any]:
        """Bytes a second that torch reads (a sum) and copies (read and written bytes), the best of five."""
        source = torch.ones(ARRAY, device=self._device)
        target = torch.empty_like(source)
        tasks = {"read": (1, source.sum), "copy": (2, lambda: target.copy_(source))}
        return {name: times * source.nbytes / min(map(_seconds, [task] * 5)) for name, (times, task) in tasks.items()}


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
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers = Answers()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(answers, request.pop("do"))(**request)
        except Exception as error:  # whatever a library raises is the runner's to tell
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        out.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
