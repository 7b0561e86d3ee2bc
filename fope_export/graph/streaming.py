"""Graphs without their weights: traced without numbers, which are made when the file is written, a piece at a time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fope_export.model.decoder import Decoder

Numbers = Callable[[str], Iterator[Tensor]]
"""By a weight's name: its pieces along the first axis, of the dtype that it has in the graph."""


class Streamed(ir.LazyTensor):
    """A weight of which no more than a piece is in memory while it is written, or itself once where it is transposed or
    asked for as a whole.
    """

    __slots__ = ("_pieces",)

    def __init__(self, pieces: Callable[[], Iterator[Tensor]], like: ir.TensorProtocol) -> None:
        """With the name, dtype and shape of another."""
        super().__init__(self._whole, dtype=like.dtype, shape=ir.Shape(like.shape.numpy()), name=like.name)
        self._pieces = pieces

    def tofile(self, file: Any) -> None:
        for piece in self._pieces():
            file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)

    def transposed(self, name: str) -> ir.LazyTensor:
        """The other way round, under another name."""
        shape = ir.Shape(self.shape.numpy()[::-1])
        return ir.LazyTensor(lambda: self._whole(transposed=True), dtype=self.dtype, shape=shape, name=name)

    def _whole(self, *, transposed: bool = False) -> ir.TensorProtocol:
        shape = self.shape.numpy()
        whole = torch.empty(shape[::-1] if transposed else shape, dtype=tensor_adapters.to_torch_dtype(self.dtype))
        start = 0
        for piece in self._pieces():
            end = start + len(piece)
            if transposed:
                whole[:, start:end] = piece.T.contiguous()
            else:
                whole[start:end] = piece
            start = end
        return tensor_adapters.TorchTensor(whole)


def one_ahead(tensors: Iterable[ir.TensorProtocol]) -> Iterator[ir.TensorProtocol]:
    """The tensors, those made that are made as a whole: each by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        following: Future[ir.TensorProtocol] | None = None
        for tensor in tensors:
            made, following = following, pool.submit(_made, tensor)
            if made:
                yield made.result()
        if following:
            yield following.result()


def _made(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor.raw() if isinstance(tensor, ir.LazyTensor) and not isinstance(tensor, Streamed) else tensor


def without_numbers(model: Decoder) -> Decoder:
    """A copy that can be traced of a decoder whose weights are on the device "meta"; the others are shared."""
    traced = model.sharing()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, weight in model.named_parameters(remove_duplicate=False):
            if weight.is_meta:
                module, _, leaf = name.rpartition(".")
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                setattr(traced.get_submodule(module), leaf, nn.Parameter(empty, requires_grad=False))
    if model.lm_head.weight is model.embed.weight:
        traced.lm_head.weight = traced.embed.weight
    return traced


def give_numbers(graph: ir.Graph, numbers: Numbers) -> None:
    """Have the weights that were traced without numbers read them from `numbers` when they are written."""
    for name, value in graph.initializers.items():
        if isinstance(getattr(tensor := value.const_value, "raw", None), FakeTensor):
            assert tensor is not None
            value.const_value = Streamed(lambda name=name: numbers(name), tensor)  # type: ignore[misc]
