"""Where a bundle first differs from its checkpoint: which tensor, and which module's output is too far off."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from polygraphy.backend.onnx import modify_outputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER
from torch import Tensor, nn

from fope_export.backends.base import Feeds, inputs_of
from fope_export.backends.eager import EagerBackend, in_numpy
from fope_export.backends.ort import open_session, runnable
from fope_export.bundle import Bundle
from fope_export.config import SpectrumConfig
from fope_export.fope import contract
from fope_export.fope.replace import rotaries
from fope_export.graph.inlining import WRITTEN_OUT, called
from fope_export.graph.passes import AXIS, POSITIONS
from fope_export.graph.reading import load_onnx, read_onnx
from fope_export.model.decoder import Attention, Block
from fope_export.parity.cases import graph_feeds
from fope_export.parity.copies import portable
from fope_export.parity.judge import MEMBERS, Floats, Noise, over
from fope_export.parity.yardstick import Yardstick

Outputs = dict[str, NDArray[np.floating[Any]]]
Running = tuple[nn.Module, Callable[[], object]]
"""A model, and what has it compute."""


LIMITS = {"rms": 2.0, "token": 15.0}
"""What a module's output may be off by, in units of rounding: less than logits may, so that a fault which those show is
seen where it is made.
"""


@dataclass(frozen=True)
class Divergence:
    """The first module, in order of execution, whose output is further from float64 than rounding explains."""

    module: str
    value: str
    """The graph's name for the output."""
    ratio: str
    """Which is too large: "rms" or "token"."""
    error: float
    """The ratio, in units of rounding."""
    allowed: float


def first_divergence(bundle: Bundle, yardstick: Yardstick, feeds: Feeds) -> Divergence | None:
    """Compare every module's output on whole sequences `feeds` (no past): ONNX Runtime against PyTorch in float64."""

    def running(backend: EagerBackend) -> Running:
        return backend.model, lambda: backend.step(feeds, backend.empty_cache(len(feeds.input_ids)))

    members = (running(yardstick.member(number)) for number in range(MEMBERS))
    inputs = graph_feeds(bundle.manifest, feeds) | inputs_of(bundle.manifest, feeds)
    double = running(yardstick.double)
    return divergence_of(bundle, double, members, inputs, yardstick.eps, yardstick.allowance)


def divergence_of(
    bundle: Bundle, double: Running, members: Iterable[Running], inputs: Mapping[str, NDArray[Any]], eps: float,
    allowance: float = 1.0,
) -> Divergence | None:  # fmt: skip
    """The same for any module, its members, and a way to run each on what the graph is given as `inputs`."""
    ending = _modules_that_end_themselves(double[0])
    values = {name: outputs for name, outputs in module_outputs(bundle.model).items() if name in ending}
    outputs = starmap(partial(_eager_outputs, values), chain([double], members))  # none outlives its turn
    truth, *noisy = outputs
    got = _bundle_outputs(bundle, list(truth), inputs) if truth else {}
    for module, names in values.items():
        for name in names:
            if name in truth and truth[name].shape == got[name].shape:
                rows = [_by_token(outputs[name]) for outputs in (truth, got, *noisy)]
                ratios = _ratios(*rows, eps=eps, allowance=allowance)
                for ratio in over(ratios, LIMITS):
                    return Divergence(module, name, ratio, ratios[ratio], LIMITS[ratio])
    return None


def _ratios(truth: Floats, got: Floats, *members: Floats, eps: float, allowance: float) -> dict[str, float]:
    ratios = Noise.of(truth.astype(np.float64), members, eps, allowance).ratios(truth, got)
    return {name: ratios[name] for name in LIMITS}


def _by_token(array: Floats) -> Floats:
    """What belongs to one token as one row: all axes after batch and sequence."""
    return array.reshape(int(np.prod(array.shape[: min(2, array.ndim - 1)])), -1)


def different_tensors(bundle: Bundle, model: nn.Module) -> list[str]:
    """Names of the checkpoint's tensors that the graph holds with other values, or not at all, in the graph's order."""
    state = model.state_dict()
    different = []
    for name, value in load_onnx(bundle.model).graph.initializers.items():
        source = name.removesuffix(".T")
        if source in state and value.const_value is not None:
            wanted = state[source].T if name.endswith(".T") else state[source]
            try:
                same = np.array_equal(value.const_value.numpy().astype(np.float64), wanted.double().numpy())
            except (OSError, ValueError):  # data that is not there
                same = False
            if not same:
                different.append(source)
    return different


def different_rotations(bundle: Bundle, model: nn.Module) -> list[str]:
    """Names of the modules whose FopeRotary call carries other settings than the checkpoint's spectrum, or has another
    axis. A call may turn tokens by one position, whatever their spectrum.
    """
    graph = _with_calls(bundle.model)
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    calls = [node for node in graph.node if node.domain == contract.DOMAIN]
    different = []
    for module, rotary in rotaries(model).items():
        call = next((node for node in calls if node.name.startswith(f"{module}/")), onnx.NodeProto())
        owner = model.get_submodule(module.rpartition(".")[0])
        carried = {a.name: onnx.helper.get_attribute_value(a) for a in call.attribute}
        queries = values.get(next(iter(call.input), ""))
        wanted = _attributes(rotary.config, owner, queries.elem_type if queries else 0)
        same = all(name in carried and np.isclose(carried[name], value, 1e-6, 0) for name, value in wanted.items())
        positions = [values[name] for name in call.input[POSITIONS : POSITIONS + 1] if name in values]
        axis = _axis(rotary.config, one=any(value.shape.dim[0].dim_value == 1 for value in positions))
        carried_axes = [tensor for tensor in graph.initializer if tensor.name in call.input[AXIS:]]
        if not same or any(_numbers(tensor, bundle.path) != axis for tensor in carried_axes):
            different.append(module)
    return different


def _axis(config: SpectrumConfig, *, one: bool) -> list[int]:
    """Which position each frequency takes, where tokens have several, or `one`."""
    return [0] * config.frequencies if one or not config.axis else [*config.axis]


def _numbers(tensor: onnx.TensorProto, folder: Path) -> list[int]:
    """Of an initializer, wherever it lies; none where it is lost."""
    try:
        numbers: list[int] = onnx.numpy_helper.to_array(tensor, base_dir=str(folder)).tolist()
    except (OSError, ValueError):
        return []
    return numbers


def _attributes(config: SpectrumConfig, owner: nn.Module, dtype: int) -> dict[str, float]:
    """What a call on tensors of the ONNX type `dtype` carries; nobody knows how many heads a user's module has."""
    heads, kv_heads = (owner.heads, owner.kv_heads) if isinstance(owner, Attention) else (0, 0)
    told, sizes = contract.settings(config), {"head_dim": config.head_dim, "groups": config.groups}
    wanted = contract.attributes(told, dtype=dtype, heads=heads, kv_heads=kv_heads, **sizes)
    return {name: value for name, value in wanted.items() if heads or not name.endswith("heads_per_group")}


def module_outputs(path: Path) -> dict[str, list[str]]:
    """Module -> names of the outputs of its own last node in the graph, in order of execution."""
    last: dict[str, list[str]] = {}
    for node in _with_calls(path).node:
        module = node.name.rpartition("/")[0]
        last.pop(module, None)
        last[module] = list(node.output)
    return {module: names for module, names in last.items() if module}


def _with_calls(path: Path) -> onnx.GraphProto:
    """The graph of an ONNX file, in which rotations are calls also where they were written out (`--inline`)."""
    graph = read_onnx(path).graph
    inside = any(WRITTEN_OUT.fullmatch(node.name) for node in graph.node)
    return ir.to_proto(called(load_onnx(path))).graph if inside else graph


def _modules_that_end_themselves(model: nn.Module) -> set[str]:
    """Modules whose last node is their own and not a part's: leaves, and blocks, which end in a sum."""
    return {name for name, module in model.named_modules() if isinstance(module, Block) or not any(module.children())}


def _eager_outputs(values: dict[str, list[str]], model: nn.Module, run: Callable[[], object]) -> Outputs:
    """What the modules inside a PyTorch model put out when it runs, under the graph's names."""
    caught: Outputs = {}
    handles = []
    for module, names in values.items():

        def catch(_module: Any, _inputs: Any, output: Any, names: list[str] = names) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            pairs = zip(names, tensors, strict=False)
            caught.update((name, in_numpy(tensor)) for name, tensor in pairs if isinstance(tensor, Tensor))

        handles.append(model.get_submodule(module).register_forward_hook(catch))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _bundle_outputs(bundle: Bundle, names: list[str], inputs: Mapping[str, NDArray[Any]]) -> Outputs:
    """The same values from the bundle's graph, through Polygraphy's runner."""
    with portable(bundle) as copied, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        model = runnable(copied)
        with OnnxrtRunner(open_session(_with_outputs(model, names), data=model.parent)) as runner:
            return dict(runner.infer(dict(inputs), check_inputs=False))


def _with_outputs(model: Path, names: list[str]) -> bytes:
    """The graph with other outputs; its weights stay where they are."""
    changed: bytes = modify_outputs(read_onnx(model), outputs=names).SerializeToString()
    return changed
