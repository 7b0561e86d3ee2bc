"""The benchmark's processes: a server, those that ask it, engines without one. All are ended by their number."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has taken, ended threads included, by Linux's clock of it."""
    return time.clock_gettime((~pid << 3) | 2)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


class Program:
    """A program that is asked by lines of JSON, and answers each by one."""

    def __init__(self, *command: str | Path, threads: int = 1, python: Path = Path(sys.executable)) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        environment |= {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        self._process = subprocess.Popen(
            [python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        self.pid, self.port = self._process.pid, 0

    def told(self) -> dict[str, Any]:
        """The next line. Raises RuntimeError where the process ended instead."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # peers say other things too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"it ended with {self._process.wait()}")

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self.told()

    def close(self) -> None:
        self._process.kill()
        with self._process:  # which closes its pipes, and waits
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Program):
    """`fope-export serve` on a free port, which was begun at `began` and answers when it is made."""

    def __init__(self, bundle: Path, threads: int, *options: str) -> None:
        self.model, self.began = bundle.name, time.monotonic()
        super().__init__(
            "-m", "fope_export", "serve", bundle, "--port", "0", "--json", "--unvalidated",
            "--threads", str(threads), *options, threads=threads,
        )  # fmt: skip
        self.port = int(self.told()["url"].rpartition(":")[2])


class Inside(Program):
    """Our engine without a server."""

    def __init__(self, bundle: Path, threads: int, slots: int, room: int, *, invariant: bool = False) -> None:
        """`room` is for the tokens of a slot."""
        numbers = map(str, (threads, slots, room, int(invariant)))
        super().__init__(HERE / "inside.py", bundle, *numbers, threads=threads)
        self.told()


class Clients(Program):
    """Those that ask, in one process."""

    def __init__(self) -> None:
        super().__init__(HERE / "client.py")

    def load(
        self, server: Program, bodies: list[dict[str, Any]], lanes: int = 1, path: str = "/v1/completions"
    ) -> dict[str, Any]:
        return self.ask(port=server.port, path=path, bodies=bodies, lanes=lanes)
