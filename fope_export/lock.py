"""One writer at a time in a folder: a lock of the kernel's, which ends with its process and holds in every container
that shares the folder.
"""

import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fope_export.errors import BundleError
from fope_export.scratch import take

FILE = ".fope_export.lock"
"""In the locked folder while there is a writer; it says who."""
TIMEOUT = 600.0
"""Seconds that a second writer waits."""
AGAIN = 0.1
"""Seconds between two tries."""
SHOWN = 200
"""Characters of another writer's command that are told."""


class Gone(Exception):  # noqa: N818
    """The folder is no longer there: moved to its place by another writer, or removed."""


@contextmanager
def held(folder: Path, deadline: float, *, name: Path | None = None, later: Path | None = None) -> Iterator[None]:
    """Hold the lock of `folder`, in messages called `name`; wait for it until `deadline` (of time.monotonic).

    The lock stays with the folder when that is renamed to `later`.

    Raises BundleError where another writer still has it then, or where the file system has no locks; Gone where the
    folder vanishes, and OSError where nothing can be written into it.
    """
    lock = _acquire(folder, deadline, name or folder)
    try:
        yield
    finally:
        _release(lock, folder, later or folder)


def _acquire(folder: Path, deadline: float, name: Path) -> int:
    told, started = "", time.monotonic()
    while True:
        lock = _open(folder / FILE)
        if _taken(lock, folder):
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(_myself()).encode(), 0)
            return lock
        other = _described(os.pread(lock, 4096, 0))
        os.close(lock)
        if time.monotonic() > deadline:
            raise BundleError(
                f"{name} is being written by {other}; waited {time.monotonic() - started:.0f} s",
                hint="Try again when that is done, or wait longer with --lock-timeout; if it hangs, end it.",
            )
        if other != told and time.monotonic() - started > AGAIN:
            logging.getLogger(__name__).warning("%s: waiting for %s", name, other)
            told = other
        time.sleep(AGAIN)


def _open(path: Path) -> int:
    """Never through a link: a bundle may come from anywhere."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except FileNotFoundError as cause:
        raise Gone from cause


def _taken(lock: int, folder: Path) -> bool:
    """Whether the lock is ours now, and still that of the folder at this path."""
    try:
        return take(lock) and _is(lock, folder / FILE)
    except OSError as cause:
        os.close(lock)
        (folder / FILE).unlink(missing_ok=True)
        raise BundleError(
            f"{folder} lies on a file system without locks ({_kind(folder)}: {cause.strerror}); nothing was written",
            hint="Two writers could destroy a bundle there: write to another disk and copy the result.",
        ) from cause


def _is(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.lstat())
    except FileNotFoundError:
        return False


def _release(lock: int, *folders: Path) -> None:
    """Remove the file from the folder, wherever that is now, while it is still ours."""
    for folder in folders:
        if _is(lock, folder / FILE):
            with suppress(OSError):
                (folder / FILE).unlink()
            break
    os.close(lock)


def _myself() -> dict[str, str]:
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:SHOWN],
        "host": platform.node(),
        "process": str(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _described(note: bytes) -> str:
    """Another writer, as far as it is known."""
    try:
        known = {name: str(value)[:SHOWN] for name, value in json.loads(note).items()}
        words = f"`{known['command']}` on {known['host']} (process {known['process']} there) since {known['since']}"
    except (ValueError, KeyError, AttributeError, RecursionError):
        return "another writer"
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def _kind(folder: Path) -> str:
    """The file system's name."""
    mount, path = ("", "unknown"), folder.resolve()
    with suppress(OSError, IndexError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split()
            if path.is_relative_to(place.replace("\\040", " ")) and len(place) >= len(mount[0]):
                mount = place, kind
    return mount[1]
