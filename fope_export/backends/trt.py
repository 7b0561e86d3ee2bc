"""An engine of the bundle in TensorRT, on torch's CUDA tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fope_export.backends.base import CHUNK, Feeds, Limits, Logits, Slots, empty_past, inputs_of, no_room
from fope_export.backends.stacked import Part, StackedSlots, fill, widest
from fope_export.bundle import Bundle
from fope_export.dtypes import DTYPES
from fope_export.errors import BackendError
from fope_export.tensorrt import api
from fope_export.tensorrt.profiles import fitting
from fope_export.tensorrt.record import EngineRecord, newest_engine, plan_in


def limits_of(bundle: Bundle) -> Limits:
    """What the bundle's engine has room for. Raises BackendError as `newest_engine` does."""
    record = newest_engine(bundle)
    return Limits(record.max("batch"), record.max("total_sequence"))


def sizes_of(feeds: Feeds, record: EngineRecord) -> dict[str, int]:
    """A step's symbolic sizes, as the engine's profiles name them."""
    batch, sequence = feeds.input_ids.shape
    total = feeds.attention_mask.shape[1]
    sizes = {"batch": batch, "sequence": sequence, "total_sequence": total}
    return sizes if record.cache == "static" else sizes | {"past_sequence": total - sequence}


@dataclass
class TrtCache:
    """Keys and values on the device, in the graph's order."""

    tensors: list[Tensor]
    recorded: "_Recorded | None" = None
    """The single-token step on these tensors, once there was one."""


class TrtBackend:
    """One engine, an execution context for each of its profiles. Caches stay on the device; a static one is written in
    place.

    `cuda_graph` replays single-token steps of a static cache from a recording: its mask is as wide as the
    engine allows.
    """

    chunk = CHUNK

    def __init__(self, bundle: Bundle, *, cuda_graph: bool = False) -> None:
        """Raises BackendError when there is no engine, no GPU, or when TensorRT does not take the plan."""
        self.record, self._manifest = newest_engine(bundle), bundle.manifest
        self.name, self.vocab_size = self.record.library, bundle.manifest.decoder().vocab_size
        if not torch.cuda.is_available():
            raise BackendError(
                f"torch {torch.__version__} sees no CUDA device",
                hint="Engines run on an NVIDIA GPU, with a torch that is built for CUDA; the ONNX file runs anywhere.",
            )
        self._trt = api.load(self.record.library)
        self._log = api.make_log(self._trt)
        self._engine = self._deserialize((bundle.path / plan_in(bundle, self.record)).read_bytes())
        self._device, self._stream = torch.device("cuda"), torch.cuda.Stream()
        self._contexts = {name: self._context(i) for i, name in enumerate(self.record.profiles)}
        self._dtype = getattr(torch, DTYPES[self.record.dtype].precision)
        self._records = cuda_graph and self.record.cache == "static"

    def _deserialize(self, plan: bytes) -> Any:
        runtime = self._trt.Runtime(self._log)
        runtime.engine_host_code_allowed = self.record.plugin_embedded  # the plugin comes out of the plan
        self._runtime = runtime
        if (engine := runtime.deserialize_cuda_engine(plan)) is None:
            raise BackendError(
                f"{self.record.library} {self._trt.__version__} does not take the plan for {self.record.gpus}, "
                f"built by version {self.record.library_version}: {self._log.errors()}",
                hint="Build the engine for this GPU and this version with `fope-export build`.",
            )
        return engine

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise BackendError(
                f"{self.record.library} makes no execution context: {self._log.errors()}",
                hint="Is there memory left on the GPU? Build with a smaller --max-batch or --max-length.",
            )
        self._stream.synchronize()
        return context

    def empty_cache(self, batch: int) -> TrtCache:
        shapes = empty_past(self._manifest, batch).values()
        with torch.cuda.stream(self._stream):
            return TrtCache([torch.zeros(shape, dtype=self._dtype, device=self._device) for shape in shapes])

    @torch.inference_mode()
    def assemble(self, parts: Sequence[Part]) -> TrtCache:
        width = widest(parts)
        with torch.cuda.stream(self._stream):
            made = []
            for tensors in zip(*(part.cache.tensors for part in parts), strict=True):
                _, heads, _, channels = tensors[0].shape
                shape = len(parts), heads, self.record.capacity or width, channels
                made.append(fill(tensors[0].new_zeros(shape), tensors, parts, width))
        return TrtCache(made)

    @torch.inference_mode()
    def step(self, feeds: Feeds, cache: TrtCache, *, last: bool = False) -> tuple[Logits, TrtCache]:
        profile = fitting(self.record.profiles, sizes_of(feeds, self.record))
        with torch.cuda.stream(self._stream):
            if self._records and feeds.input_ids.shape[1] == 1:
                cache.recorded = cache.recorded or _Recorded(self, profile, cache)
                logits = cache.recorded.step(feeds)
            else:
                arrays = inputs_of(self._manifest, feeds)
                inputs = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
                logits, cache = self._run(profile, {name: x.to(self._device) for name, x in inputs.items()}, cache)
            answer: Logits = logits[:, -int(last) :].float().cpu().numpy()
        return answer, cache

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:  # noqa: ARG002
        if count > (most := self.record.max("batch")):
            raise no_room("rows", count, most)
        return StackedSlots(self, count, self.record.max("total_sequence"), whole=whole)

    def close(self) -> None:
        self._contexts.clear()
        del self._engine

    def _run(self, profile: str, inputs: dict[str, Tensor], cache: TrtCache) -> tuple[Tensor, TrtCache]:
        """Enqueue one step on the current stream."""
        past = [port.name for port in self._manifest.inputs if port.name not in Feeds._fields]
        context, bound = self._contexts[profile], inputs | dict(zip(past, cache.tensors, strict=True))
        for name, tensor in bound.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._failure(f"the shape {tuple(tensor.shape)} of {name}")
            self._bind(context, name, tensor)
        logits_name, *present_names = (port.name for port in self._manifest.outputs)
        logits = self._output(context, logits_name)
        if self.record.cache == "static":
            present = cache
            for name, tensor in zip(present_names, cache.tensors, strict=True):
                self._bind(context, name, tensor)
        else:
            present = TrtCache([self._output(context, name) for name in present_names])
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise self._failure("the step")
        return logits, present

    def _output(self, context: Any, name: str) -> Tensor:
        tensor = torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtype, device=self._device)
        self._bind(context, name, tensor)
        return tensor

    def _bind(self, context: Any, name: str, tensor: Tensor) -> None:
        # An empty cache has no address, and TensorRT insists on one.
        address = tensor.data_ptr() or torch.empty(1, device=self._device).data_ptr()
        if not context.set_tensor_address(name, address):
            raise self._failure(f"the address of {name}")

    def _failure(self, what: str) -> BackendError:
        return BackendError(
            f"{self.record.library} refuses {what}: {self._log.errors()}",
            hint="Build the engine again with `fope-export build`, or choose another --backend.",
        )


class _Recorded:
    """A single-token step as a CUDA graph: the same shapes and addresses every time."""

    def __init__(self, backend: TrtBackend, profile: str, cache: TrtCache) -> None:
        batch, widest = len(cache.tensors[0]), backend.record.max("total_sequence")
        sizes, self._manifest = {"batch": batch, "sequence": 1, "total_sequence": widest}, backend._manifest
        self._inputs = {
            port.name: torch.zeros(port.at(sizes), dtype=torch.int64, device=cache.tensors[0].device)
            for port in self._manifest.inputs
            if port.name in Feeds._fields
        }
        kept = [tensor[:, :, :1].clone() for tensor in cache.tensors]  # trying it out writes the first slot
        backend._run(profile, self._inputs, cache)
        torch.cuda.current_stream().synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self._logits, _ = backend._run(profile, self._inputs, cache)
        for tensor, slot in zip(cache.tensors, kept, strict=True):
            tensor[:, :, :1] = slot

    def step(self, feeds: Feeds) -> Tensor:
        for name, array in inputs_of(self._manifest, feeds).items():
            buffer, width = self._inputs[name], array.shape[-1]
            buffer[..., :width].copy_(torch.from_numpy(np.ascontiguousarray(array)))
            buffer[..., width:].zero_()
        self._graph.replay()
        return self._logits
