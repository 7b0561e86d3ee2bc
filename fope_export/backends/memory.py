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
    """Makes arrays of one kind of number, and says where they lie."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """A new array of this device's kind."""
        ...

    def placed(self, host: NDArray[Any]) -> Array:
        """What a graph reads in the place of `host`: itself, or a copy that `upload` renews."""
        ...

    def upload(self, hosts: Mapping[str, NDArray[Any]], placed: Mapping[str, Array]) -> None:
        """Have `placed` arrays say what their hosts say now."""
        ...

    def read(self, array: Array) -> NDArray[Any]:
        """The numbers on the host: the array itself where it lies there."""
        ...

    def binding(self, array: Array) -> Binding:
        """An array as ONNX Runtime's bindings take it."""
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
