"""PyTorch's memory on a GPU, for the backends that keep their caches there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fope_export.backends.memory import Binding
from fope_export.errors import BackendError

NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.float16: np.float16}


class Cuda:
    """Memory of the current GPU.

    Raises BackendError where PyTorch finds none.
    """

    def __init__(self, kind: type[np.generic]) -> None:
        if not torch.cuda.is_available():
            raise BackendError("PyTorch finds no GPU, and caches are its tensors", hint="Install PyTorch for CUDA.")
        self._dtype: torch.dtype = getattr(torch, kind.__name__)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device="cuda")

    def placed(self, host: NDArray[Any]) -> Tensor:
        return torch.from_numpy(host).cuda()

    def upload(self, hosts: Mapping[str, NDArray[Any]], placed: Mapping[str, Tensor]) -> None:
        for name, tensor in placed.items():
            tensor.copy_(torch.from_numpy(hosts[name]))
        torch.cuda.current_stream().synchronize()

    def read(self, array: Tensor) -> NDArray[Any]:
        return array.cpu().numpy()

    def binding(self, array: Tensor) -> Binding:
        return "cuda", array.device.index or 0, NUMPY[array.dtype], tuple(array.shape), array.data_ptr()
