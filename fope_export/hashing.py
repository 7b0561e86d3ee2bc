"""SHA-256 of files while other work is done, and of what is being written."""

import hashlib
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Condition
from typing import BinaryIO, Self

BLOCK = 1 << 20
"""Bytes that are read at once."""
AHEAD = 1 << 30
"""Bytes that may be read ahead of who else reads them: the system still has them then."""


class Hashing:
    """The SHA-256 of files by name, found by a thread while a `with` block reads them too: it stays a little ahead of
    what `follow` is told, so that each is read from the disk once. Call it for what it found. A block that ends earlier
    ends the thread.
    """

    def __init__(self, paths: Iterable[Path], ahead: int = AHEAD) -> None:
        self._paths, self._ahead, self._ended = tuple(paths), ahead, False
        self.read, self._allowed, self._changed = 0, float(ahead), Condition()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._size = sum(path.stat().st_size for path in self._paths)
        self._found = self._pool.submit(lambda: {path.name: self._digest(path) for path in self._paths})
        return self

    def _digest(self, path: Path) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as file:
            while self._may_go_on() and (count := file.readinto(block)):
                digest.update(block[:count])
                self.read += count
        return digest.hexdigest()

    def _may_go_on(self) -> bool:
        """Wait until there is something to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self.read < self._allowed)
            return not self._ended

    def follow(self, done: int, total: int) -> None:
        """Of the work that reads the files, so much is done."""
        self._allow(self._size * done / max(total, 1) + self._ahead)

    def _allow(self, size: float, *, ended: bool = False) -> None:
        with self._changed:
            self._allowed, self._ended = size, ended
            self._changed.notify_all()

    def __call__(self) -> dict[str, str]:
        """Wait for all of them. Raises OSError where a file cannot be read."""
        self._allow(math.inf)
        return self._found.result()

    def __exit__(self, *_: object) -> None:
        self._allow(math.inf, ended=True)
        self._pool.shutdown()


class HashedFile:
    """A file that is written from its start to its end, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`; the number of bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self.size += len(view)
        return len(view)

    def hexdigest(self) -> str:
        """Of everything up to now."""
        return self._digest.hexdigest()
