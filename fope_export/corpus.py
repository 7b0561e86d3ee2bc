"""Text that every installation has: the source of Python's standard library, split once and for all by file name."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEPARATOR = b"\0"
LEFT_OUT = frozenset(
    "test tests idle_test encodings pydoc_data site-packages dist-packages __pycache__ lib2to3 turtledemo".split()
)


def python_source(*, held_out: bool) -> bytes:
    """The files of one side, in order of their names, with a zero byte after each.

    A file is held out when the hash of its name says so, about one in twenty: the same files in every Python version,
    so that no trained model has seen them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen = (path for path in sorted(root.rglob("*.py")) if _is_held_out(path.relative_to(root), held_out))
    return b"".join(path.read_bytes() + SEPARATOR for path in chosen)


def _is_held_out(path: Path, wanted: bool) -> bool:
    if LEFT_OUT & set(path.parts):
        return False
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return (digest[0] % 20 == 0) == wanted


def as_tokens(text: bytes) -> NDArray[np.int64]:
    """Byte-level tokens: a byte's value is its id."""
    return np.frombuffer(text, np.uint8).astype(np.int64)
