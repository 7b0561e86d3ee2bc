"""Puts what a writer has prepared in its place: beside the old and exchanged with it, or file by file where the folder
itself must stay. Cut short anywhere, the next command finds the old or the new, or finishes.
"""

import ctypes
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fope_export.errors import BundleError
from fope_export.lock import FILE, Gone, held

OURS = ".fope_export."
"""What begins so is a writer's, and nobody's when there is none."""
STAGED, COMMITTED = f"{OURS}partial", f"{OURS}commit"
"""Inside a folder: files that are being prepared, and files that are whole and on their way to their places."""
Settle = Callable[[Path], None]
"""Moves the files of a folder's COMMITTED to their places; may be repeated after it was cut short."""
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)


@contextmanager
def holding(folder: Path, timeout: float, settle: Settle) -> Iterator[None]:
    """Be the only writer of a folder that is there; first finish or remove what a killed writer left in it.

    Raises BundleError, or OSError where nothing can be written.
    """
    try:
        with held(folder, time.monotonic() + timeout):
            tidy(folder, settle)
            _tidy_beside(folder.resolve())
            try:
                yield
            finally:
                shutil.rmtree(folder / STAGED, ignore_errors=True)
    except Gone as cause:
        raise BundleError(
            f"{folder} is no longer there", hint="Who removed it? Export the checkpoint again."
        ) from cause


@contextmanager
def preparing(out: Path, timeout: float, settle: Settle) -> Iterator[Path]:
    """An empty folder for what `put` then makes of `out`, whose only writer this is meanwhile.

    Raises BundleError, or OSError where nothing can be written.
    """
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        work = _enter(out, deadline, settle, stack)
        try:
            yield work
        finally:
            _clear(work)


def _enter(out: Path, deadline: float, settle: Settle, stack: ExitStack) -> Path:
    """Take the locks of `out`, where it is there, and of the folder beside it, where there may be one."""
    beside = _beside(out, "partial")
    while True:
        there = out.is_dir()
        with ExitStack() as tried:
            tried.callback(_remove_empty, beside)
            try:
                if there:
                    tried.enter_context(held(out, deadline, later=beside))
                work = beside if not there or _may_move(out, beside) else out / STAGED
                if work == beside:
                    beside.mkdir(exist_ok=True)
                    tried.enter_context(held(beside, deadline, name=out, later=out))
            except Gone:
                continue
            if out.is_dir() != there or _brought_back(out):
                continue
            if there:
                tidy(out, settle)
            _clear(work)
            work.mkdir(exist_ok=True)
            stack.push(tried.pop_all())
            return work


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}"


def _may_move(out: Path, beside: Path) -> bool:
    """Whether the folder may be another one afterwards: not where something is mounted, where this process stands, or
    where nothing can be put beside it.
    """
    if out.is_mount():
        return False
    with suppress(OSError):
        if Path.cwd().is_relative_to(out):
            return False
        beside.mkdir(exist_ok=True)
        return True
    return False


def _brought_back(out: Path) -> bool:
    """Undo half of an exchange by two renames."""
    old = _beside(out, "old")
    if not old.is_dir():
        return False
    if not out.exists():
        old.rename(out)
        return True
    shutil.rmtree(old, ignore_errors=True)
    return False


def _clear(work: Path) -> None:
    """Remove what is in a folder that only its lock protects, the lock last."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in work.iterdir():
            if path.name != FILE:
                _remove(path)
    if work.name == STAGED:
        _remove_empty(work)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def tidy(folder: Path, settle: Settle) -> None:
    """Finish, or remove, what a writer left that was killed. For its only writer."""
    committed = folder / COMMITTED
    if committed.is_dir() and not committed.is_symlink():
        settle(folder)
    for path in folder.glob(f"{OURS}*"):
        if path.name != FILE:
            _remove(path)


def _tidy_beside(out: Path) -> None:
    """The same for the folder beside `out`, unless it has a living writer or may not be touched."""
    if (beside := _beside(out, "partial")).is_dir():
        with suppress(OSError, BundleError, Gone), ExitStack() as stack:
            stack.callback(_remove_empty, beside)
            stack.enter_context(held(beside, 0, name=out))
            _brought_back(out)
            _clear(beside)


def repair(folder: Path, settle: Settle) -> None:
    """The same for a reader, where it can: what a living writer has, or what cannot be written, stays."""
    if any(folder.glob(f"{OURS}*")):
        with suppress(OSError, BundleError), holding(folder, 0, settle):
            pass


def committing(folder: Path) -> bool:
    """Whether a writer is moving files to their places right now."""
    return (folder / COMMITTED).is_dir()


def put(work: Path, out: Path, settle: Settle) -> None:
    """Make what `preparing` gave the content of `out`."""
    flush(work)
    if work.parent == out:
        commit(out, settle)
        return
    try:
        _exchange(work, out)
    except OSError:
        if not out.is_dir():
            raise
        inside = out / STAGED
        inside.mkdir()
        for path in list(work.iterdir()):
            if path.name != FILE:
                shutil.move(path, inside / path.name)
        flush(inside)
        commit(out, settle)


def _exchange(work: Path, out: Path) -> None:
    """The one takes the other's place, in one step where the system can."""
    if not out.exists():
        work.rename(out)
    elif not _exchanged(work, out):
        old = _beside(out, "old")
        out.rename(old)
        try:
            work.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    flush_folder(out.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system can do it in one step, and did."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(other))


def commit(folder: Path, settle: Settle) -> None:
    """From here on the files in STAGED are the folder's, whatever happens."""
    (folder / STAGED).rename(folder / COMMITTED)
    flush_folder(folder)
    settle(folder)


def flush(folder: Path) -> None:
    """Have the disk keep all files of a folder."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(place))


def flush_folder(folder: Path) -> None:
    """Have the disk keep a folder's names. Some file systems have nothing to do for it, and say so by an error."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)
