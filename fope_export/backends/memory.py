"""Where a cache lies, as ONNX Runtime binds it: NumPy's arrays on the host; `cuda` has PyTorch's tensors on a GPU."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any
"""NumPy's on a host, PyTorch's on a GPU: both have a shape, and parts of both are read and written by index."""
Binding = tuple[str, int, Any, tuple[int, ...], int]
"""Device, its number, NumPy's type, shape, address."""


class Device(Protocol):
    """The memory of one processor, in which arrays of one kind of number (a cache's) are made and bound to a graph."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """A new array of zeros in this memory."""
        ...

    def placed(self, host: NDArray[Any]) -> Array:
        """What a graph reads in the place of the array `host`: itself, or a copy that `upload` renews."""
        ...

    def upload(self, hosts: Mapping[str, NDArray[Any]], placed: Mapping[str, Array]) -> None:
        """Copy what `hosts` hold now to the arrays that `placed` made of them, by the same names."""
        ...

    def read(self, array: Array) -> NDArray[Any]:
        """An array of this memory as NumPy's: itself where it lies on the host, else a copy."""
        ...

    def binding(self, array: Array) -> Binding:
        """Where an array lies, as ONNX Runtime's bindings are told."""
        ...


class Host:
    """Memory of this process. What is never written takes none."""

    def __init__(self, kind: type[np.generic]) -> None:
        self._kind = kind

    def zeros(self, shape: tuple[int, ...]) -> NDArray[Any]:
        return np.zeros(shape, self._kind)

    def placed(self, host: NDArray[Any]) -> NDArray[Any]:
        return host

    def upload(self, hosts: Mapping[str, NDArray[Any]], placed: Mapping[str, Array]) -> None:
        """They are the same memory."""

    def read(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def binding(self, array: NDArray[Any]) -> Binding:
        return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
