"""Temporary folders that do not outlive their process for long: what a killed one leaves, the next command removes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PREFIX = "fope-export-"


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder in `parent` (default: the system's temporary folder), gone when the block ends; those of dead
    processes go before.
    """
    sweep(parent)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: Path | None) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(FileNotFoundError):  # a sweep was faster than the lock
            lock = os.open(folder, os.O_RDONLY)
            if take(lock) and folder.exists():
                return folder, lock
            os.close(lock)


def sweep(parent: Path | None = None) -> None:
    """Remove such folders of this user whose process is gone."""
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if take(lock):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def take(lock: int) -> bool:
    """Whether this open file got the kernel's lock at once. It goes when the file is closed, or its process ends.

    Raises OSError where the file system has no locks.
    """
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Kept:
    """Temporary folders that live as long as the process."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def folder(self) -> Path:
        """A new one."""
        import atexit

        if not self._open:
            atexit.register(self.clear)
        self._open.append(context := scratch())
        return context.__enter__()

    def clear(self) -> None:
        """Remove them: for a process that ends without saying so to Python."""
        while self._open:
            self._open.pop().__exit__(None, None, None)


KEPT = Kept()
