"""The other end of a worker."""

import json
import tempfile
from contextlib import suppress
from subprocess import PIPE
from typing import Any

from fope_export.errors import BackendError
from fope_export.processes import child, environment, python

QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
SHOWN = 300
"""Characters of a failure that are told."""
LEFT_OUT = "Measure without it: --backends names those to be timed, and --peers libraries beside them."


class Worker:
    """A process for one contender; leaving the `with` block ends it."""

    def __init__(self, threads: int) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed on leaving)
        environ = environment(QUIET | {"OMP_NUM_THREADS": str(threads)})
        command = python("fope_export.benchmark.worker")
        self._running = child(command, stdin=PIPE, stdout=PIPE, stderr=self._said, text=True, env=environ)
        self._process = self._running.__enter__()

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """One request and its answer. Raises BackendError with what the contender says, or with how it ended."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do} | what) + "\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise BackendError(f"its process ended with {self._process.wait()}: {self._last_words()}", hint=LEFT_OUT)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BackendError(reply["error"][:SHOWN], hint=LEFT_OUT)
        return reply

    def _last_words(self) -> str:
        self._said.seek(0)
        return " ".join(self._said.read().decode(errors="replace").split())[-SHOWN:]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)
        self._said.close()
