"""The one door for tensors from outside: what a file promises is held against its size before any memory is taken.

Nothing in a file is executed, and what comes out is dense and strided with numbers behind every element.
"""

import ctypes
import math
import mmap
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from fope_export.documents import LISTING, check_file, read_object
from fope_export.errors import CheckpointError, ConfigError, cut

AGAIN = "The file looks truncated or damaged: copy it again."
DENSE = "Save dense tensors from the CPU; quantized (but for blockwise FP8) and sparse checkpoints are not read."
NAME = 1000
"""Characters of a tensor's name at most."""
PAGE_OUT = 21
"""Linux's MADV_PAGEOUT, since 5.4."""
PAGE = 1 << 16
"""Bytes that a file of tensors may hold less than they take together: alignment, and a storage that ends early."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a .safetensors, .pt or .bin file, or of all files of a .safetensors.index.json, and the names of
    these files; memory-mapped where the file allows it.

    Raises CheckpointError when one is missing or truncated, is not such a file, or holds anything but tensors.
    """
    if path.suffix != ".json":
        return _read_file(path), ()
    index = read_object(path, most=LISTING, raises=CheckpointError).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in index.values()
    ):
        raise CheckpointError(f"{path}: no weight_map from tensors to files", hint="Is it the weights' index?")
    shards = tuple(sorted(set(index.values())))
    for name in shards:
        if not (path.parent / name).exists():
            raise CheckpointError(f"{path}: {cut(name)} is not there", hint="Copy all files that the index names.")
    tensors = {key: (name, tensor) for name in shards for key, tensor in _read_file(path.parent / name).items()}
    if misplaced := [key for key in tensors.keys() | index.keys() if tensors.get(key, ("",))[0] != index.get(key)]:
        raise CheckpointError(
            f"{path}: {cut(min(misplaced))} is not in the file that the index says",
            hint="Index and files are of different checkpoints.",
        )
    return {key: tensor for key, (_, tensor) in tensors.items()}, shards


def _read_file(path: Path) -> dict[str, Tensor]:
    size = check_file(path, raises=CheckpointError, hint=AGAIN)
    try:
        data = load_file(path) if path.suffix == ".safetensors" else _unpickled(path, size)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as cause:
        raise CheckpointError(
            f"{path}: not a plain file of tensors",
            hint="Only plain state dicts are read; nothing in a checkpoint is executed.",
        ) from cause
    except Exception as cause:  # a damaged file can raise anything
        reason = cut(str(cause).partition(". ")[0])
        raise CheckpointError(f"{path}: cannot be read: {reason}", hint=AGAIN) from cause
    if not isinstance(data, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, found {type(data).__name__}",
            hint="Save the model's state_dict() alone.",
        )
    if long := [name for name in data if len(name) > NAME]:
        raise CheckpointError(f"{path}: a tensor is called {cut(long[0])}", hint=AGAIN)
    for name, tensor in data.items():
        _check_dense(tensor, f"{path}: {cut(name)}")
    _check_promises(data.values(), size, path)
    return dict(data)


def _unpickled(path: Path, size: int) -> Any:
    """What torch reads from a .pt or .bin file without executing anything."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if packed := [each.filename for each in members if each.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(f"{path}: {cut(packed[0])} is compressed", hint="Save it again with torch.save.")
        if (promised := sum(each.file_size for each in members)) > size:
            raise CheckpointError(f"{path}: its parts claim {promised:,} bytes, the file has {size:,}", hint=AGAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a pickle protocol that it may not read: then it raises too
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _check_dense(tensor: Tensor, where: str) -> None:
    """Raises CheckpointError for a tensor without a number of its own behind every element."""
    what = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
    if what != "torch.strided":
        raise CheckpointError(f"{where} is {tensor.dtype}, {what}; expected dense floating point", hint=DENSE)
    if tensor.device.type != "cpu":
        raise CheckpointError(f"{where} holds no numbers: it is on device {tensor.device}", hint=DENSE)
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{where} has shape {tuple(tensor.shape)}, and {tensor.untyped_storage().nbytes():,} bytes for it",
            hint="A view that repeats its numbers; save tensor.contiguous().",
        )


def _check_promises(tensors: Any, size: int, path: Path) -> None:
    """Raises CheckpointError where tensors claim more memory than their file has bytes."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if (promised := sum(storages.values())) > size + PAGE:
        raise CheckpointError(f"{path}: its tensors claim {promised:,} bytes, the file has {size:,}", hint=AGAIN)


def release(tensor: Tensor) -> None:
    """Give back the memory of a mapped file's pages that hold `tensor`, which it may have; they are read again when
    they are needed, and memory that is no file's keeps its numbers.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:  # an older Linux refuses, and then they stay
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGE_OUT)


def read_array(path: Path, *, hint: str) -> NDArray[Any]:
    """The array in a .npy file, memory-mapped, so that it is no larger than the file.

    Raises ConfigError where the file is none, or holds objects.
    """
    size = check_file(path, raises=ConfigError, hint=hint)
    try:
        with np.errstate(over="raise"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError, ArithmeticError) as cause:
        raise ConfigError(f"{path}: not an array that was saved by NumPy: {cut(cause)}", hint=hint) from cause
    if not isinstance(array, np.ndarray) or math.prod(array.shape) * array.itemsize > size:
        raise ConfigError(f"{path}: not one array that was saved by NumPy", hint=hint)
    return array
