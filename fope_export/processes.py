"""The one place that starts other programs: none of them outlives this process, or runs code of the current folder."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

from fope_export.keeper import REFUSED

KEEPER = Path(__file__).with_name("keeper.py")


def python(module: str) -> list[str]:
    """The command that runs a module of ours in a process of its own."""
    return [sys.executable, "-P", "-m", module]


def clean_path() -> None:
    """Take the current folder out of the places that modules are imported from, unless PYTHONPATH names it.

    `python -m` and an empty entry of PYTHONPATH put it there, and what lies there may be a checkpoint.
    """
    named, package = {*os.environ.get("PYTHONPATH", "").split(os.pathsep)} - {""}, str(Path(__file__).parents[1])
    with suppress(FileNotFoundError):  # a current folder that was removed holds nothing
        unwanted = {"", str(Path.cwd())} - named - {package}
        sys.path[:] = [entry for entry in sys.path if entry not in unwanted]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For a program that may be Python, or start one: without what puts the current folder among its modules."""
    path = os.pathsep.join(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **(more or {})}


@contextmanager
def answering() -> Iterator[Callable[[Any], None]]:
    """For a program that answers in lines of JSON on stdout: what writes one. What libraries print goes to stderr."""
    import msgspec

    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)

        def answer(what: Any) -> None:
            answers.write(msgspec.json.encode(what) + b"\n")
            answers.flush()

        yield answer


@contextmanager
def child(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A running program; `options` are Popen's. It ends with the block, and with this process even where that is
    killed, and so does all that it started.

    Raises OSError where it does not start.
    """
    watched, held = os.pipe()
    kept = [sys.executable, "-I", "-S", str(KEEPER), str(watched), *map(str, command)]
    options = {"env": environment()} | options
    try:
        process = subprocess.Popen(kept, pass_fds=(watched,), start_new_session=True, **options)  # noqa: S603
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(watched)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):
                if pipe:
                    pipe.close()
        process.wait()
        os.close(held)


def output(
    command: Sequence[str | Path], *, timeout: float | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a program prints, and its exit code. Raises OSError where it does not start, and TimeoutExpired."""
    if not os.access(command[0], os.X_OK):
        raise FileNotFoundError(f"{command[0]} is no program")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with child(
        command, text=True, errors="replace", env=environment() if env is None else dict(env), **pipes
    ) as running:
        out, told = running.communicate(timeout=timeout)
        if told.startswith(REFUSED):
            raise OSError(told.removeprefix(REFUSED).strip())
        return subprocess.CompletedProcess(list(map(str, command)), running.returncode, out, told)
