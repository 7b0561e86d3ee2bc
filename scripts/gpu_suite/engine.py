"""A TensorRT-RTX plan on the card: deserialized and run once, and what happened."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from fope_export.errors import BackendError

MODULE = "tensorrt_rtx"


def run_plan(plan: Path | None, plugin: Path | None) -> dict[str, Any]:
    """Success with the outputs' shapes, or the text of the error: this is a report, not a check."""
    if importlib.util.find_spec(MODULE) is None:
        return {"status": "not installed"}
    if plan is None:
        return {"status": "no plan was given"}
    try:
        return {"status": "ran", **_run(plan, plugin)}
    except Exception as error:  # whatever it is, it is the result
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _run(plan: Path, plugin: Path | None) -> dict[str, Any]:
    from fope_export.fope import contract
    from fope_export.tensorrt import api

    trt = api.load("tensorrt-rtx")
    log = api.make_log(trt)
    if plugin:
        versions = map(str, contract.VERSIONS)
        api.load_plugin(trt, plugin, log, name=contract.NAME, versions=versions, namespace=contract.DOMAIN)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True  # the plan may carry the plugin
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise BackendError(f"the plan does not deserialize: {log.errors()}", hint="Build it for this GPU.")
    outputs = _step(trt, engine, engine.create_execution_context(), log)
    return {
        "version": trt.__version__,
        "outputs": {name: list(tensor.shape) for name, tensor in outputs.items()},
        "finite": all(bool(tensor.isfinite().all()) for tensor in outputs.values() if tensor.is_floating_point()),
    }


def _step(trt: Any, engine: Any, context: Any, log: Any) -> dict[str, torch.Tensor]:
    """One execution at the first profile's best shapes: ones for whole numbers, small random ones for the rest."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    tensors = {}
    for name in inputs:
        shape = tuple(engine.get_tensor_shape(name))
        if -1 in shape:
            shape = tuple(engine.get_tensor_profile_shape(name, 0)[1])
            context.set_input_shape(name, shape)
        dtype = _dtype(engine, name)
        full = 0.1 * torch.randn(shape, device="cuda") if dtype.is_floating_point else torch.ones(shape, device="cuda")
        tensors[name] = full.to(dtype)
    for name in names:
        if name not in tensors:
            tensors[name] = torch.zeros(
                tuple(context.get_tensor_shape(name)), dtype=_dtype(engine, name), device="cuda"
            )
        context.set_tensor_address(name, tensors[name].data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        raise BackendError(f"the engine does not run: {log.errors()}", hint="See the error.")
    torch.cuda.synchronize()
    return {name: tensor for name, tensor in tensors.items() if name not in inputs}


def _dtype(engine: Any, name: str) -> torch.dtype:
    known = {
        "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16,
        "INT32": torch.int32, "INT64": torch.int64, "BOOL": torch.bool,
    }  # fmt: skip
    return known[engine.get_tensor_dtype(name).name]
