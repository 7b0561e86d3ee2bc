"""SHA-256 of files: at once, while other work is done, and of what is being written."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import BinaryIO, Self

BLOCK = 1 << 20
"""Bytes that are read at once."""


class Hashing:
    """The SHA-256 of files by name, found by a thread while a `with` block does other work; call it for them. A block
    that ends earlier ends the thread.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths, self._ended, self._pool = tuple(paths), Event(), ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._found = self._pool.submit(lambda: {path.name: self._digest(path) for path in self._paths})
        return self

    def _digest(self, path: Path) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as file:
            while not self._ended.is_set() and (count := file.readinto(block)):
                digest.update(block[:count])
        return digest.hexdigest()

    def __call__(self) -> dict[str, str]:
        """Wait for all of them. Raises OSError where a file cannot be read."""
        return self._found.result()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
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
