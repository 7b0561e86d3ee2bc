"""Where a bundle first differs from its checkpoint: which tensor, and which module's output is too far off."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from polygraphy.backend.onnx import modify_outputs
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from fope_export.backends.base import Feeds
from fope_export.backends.eager import EagerBackend, in_numpy
from fope_export.backends.ort import runnable
from fope_export.bundle import Bundle
from fope_export.fope.contract import DOMAIN
from fope_export.model.decoder import Block, Decoder
from fope_export.parity.cases import graph_feeds
from fope_export.parity.judge import limit

Outputs = dict[str, NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Divergence:
    """The first module, in order of execution, whose output is further from float64 than the rule allows."""

    module: str
    value: str
    """The graph's name for the output."""
    error: float
    allowed: float


def first_divergence(bundle: Bundle, single: EagerBackend, double: EagerBackend, feeds: Feeds) -> Divergence | None:
    """Compare every module's output on whole sequences `feeds` (no past): ONNX Runtime against PyTorch in float64."""
    ending = _modules_that_end_themselves(single.model)
    values = {name: outputs for name, outputs in module_outputs(bundle.model).items() if name in ending}
    truth, noisy = (_eager_outputs(backend, feeds, values) for backend in (double, single))
    allowed = {name: limit(truth[name], noisy[name]) for name in truth}
    got = _bundle_outputs(bundle, list(truth), feeds)
    compare = SimpleCompareFunc(rtol=0.0, atol=allowed, check_error_stat="max")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = compare(IterationResult(got), IterationResult(truth))
    for module, names in values.items():
        for name in names:
            if name in truth and not results[name]:
                error = float(np.abs(got[name].astype(np.float64) - truth[name]).max())
                return Divergence(module, name, error, allowed[name])
    return None


def different_tensors(bundle: Bundle, model: Decoder) -> list[str]:
    """Names of the checkpoint's tensors that the graph holds with other values, or not at all, in the graph's order."""
    state = model.state_dict()
    found = []
    for name, value in ir.load(bundle.model).graph.initializers.items():
        source = name.removesuffix(".T")
        if source in state and value.const_value is not None:
            wanted = state[source].T if name.endswith(".T") else state[source]
            try:
                same = np.array_equal(value.const_value.numpy().astype(np.float64), wanted.double().numpy())
            except (OSError, ValueError):  # data that is not there
                same = False
            if not same:
                found.append(source)
    return found


def different_rotations(bundle: Bundle, model: Decoder) -> list[str]:
    """Names of the modules whose FopeRotary call carries other settings than the checkpoint's spectrum."""
    calls = [node for node in onnx.load(bundle.model, load_external_data=False).graph.node if node.domain == DOMAIN]
    found = []
    for i, attention in enumerate(model.attentions()):
        c, module = attention.rotary.config, f"layers.{i}.attention.rotary"
        wanted = {
            "sin_pad": c.sin_pad, "cos_pad": c.cos_pad, "sign": float(c.sign), "head_dim": c.head_dim,
            "interleaved": int(c.pairing == "interleaved"), "heads_per_group": attention.heads // c.groups,
            "kv_heads_per_group": attention.kv_heads // c.groups,
        }  # fmt: skip
        call = next((node for node in calls if node.name.startswith(f"{module}/")), onnx.NodeProto())
        carried = {a.name: onnx.helper.get_attribute_value(a) for a in call.attribute}
        if any(name not in carried or not np.isclose(carried[name], value, 1e-6, 0) for name, value in wanted.items()):
            found.append(module)
    return found


def module_outputs(path: Path) -> dict[str, list[str]]:
    """Module -> names of the outputs of its own last node in the graph, in order of execution."""
    last: dict[str, list[str]] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        module = node.name.rpartition("/")[0]
        last.pop(module, None)
        last[module] = list(node.output)
    return {module: names for module, names in last.items() if module}


def _modules_that_end_themselves(model: Decoder) -> set[str]:
    """Modules whose last node is their own and not a part's: leaves, and blocks, which end in a sum."""
    return {name for name, module in model.named_modules() if isinstance(module, Block) or not any(module.children())}


def _eager_outputs(backend: EagerBackend, feeds: Feeds, values: dict[str, list[str]]) -> Outputs:
    """What the modules of a PyTorch decoder put out for `feeds`, under the graph's names."""
    caught: Outputs = {}
    handles = []
    for module, names in values.items():

        def catch(_module: Any, _inputs: Any, output: Any, names: list[str] = names) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            caught.update((name, in_numpy(tensor)) for name, tensor in zip(names, tensors, strict=False))

        handles.append(backend.model.get_submodule(module).register_forward_hook(catch))
    try:
        backend.step(feeds, backend.empty_cache(len(feeds.input_ids)))
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _bundle_outputs(bundle: Bundle, names: list[str], feeds: Feeds) -> Outputs:
    """The same values from the bundle's graph, through Polygraphy's runner."""
    with runnable(bundle) as model, _with_outputs(model, names) as path, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        session = SessionFromOnnx(str(path), providers=["CPUExecutionProvider"])
        with OnnxrtRunner(session) as runner:
            return dict(runner.infer(graph_feeds(bundle.manifest, feeds), check_inputs=False))


@contextmanager
def _with_outputs(model: Path, names: list[str]) -> Iterator[Path]:
    """A copy of the graph with other outputs, beside the original so that it finds the weights."""
    path = model.with_name(f".probe.{os.getpid()}.onnx")
    try:
        onnx.save(modify_outputs(onnx.load(model, load_external_data=False), outputs=names), path)
        yield path
    finally:
        path.unlink(missing_ok=True)
