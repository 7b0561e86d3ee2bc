"""Numbers that lie in a temporary file without a name: the system takes their memory back when it needs it, and the
disk's when nobody has them any more.
"""

import math
import os
import time
from mmap import mmap
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fope_export.backends.base import Backend
from fope_export.parity.cases import Case
from fope_export.parity.judge import Floats


def on_disk(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros to be written over. Raises OSError where the disk is full."""
    size = math.prod(shape) * dtype.itemsize
    with TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.frombuffer(mmap(file.fileno(), size), dtype=dtype).view(shape)


def moved_to_disk(tensor: Tensor) -> Tensor:
    """A copy. Raises OSError where the disk is full."""
    return on_disk(tensor.shape, tensor.dtype).copy_(tensor)


def kept(logits: Floats) -> Floats:
    """A copy. Raises OSError where the disk is full."""
    return np.asarray(moved_to_disk(torch.from_numpy(logits)).numpy())


class Given(NamedTuple):
    """The logits that a file gave in one case, on the disk, and the seconds that it took."""

    logits: Floats
    seconds: float


def given(case: Case, backend: Backend) -> Given:
    """Run a case. Raises OSError where the disk is full."""
    started = time.perf_counter()
    logits = case.run(backend)
    seconds = time.perf_counter() - started
    return Given(kept(logits), seconds)
