"""A decoder's graph in parts that lie one after the other, each with its own weights alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import Sequential

from fope_export.backends.ort import failure, open_session, runnable
from fope_export.bundle import Bundle
from fope_export.errors import BackendError, BundleError
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import way_of
from fope_export.onnx_files import AGAIN


@dataclass(frozen=True)
class Parts:
    """The file that ONNX Runtime has of a bundle, cut between its embedding, its layers and its head."""

    path: Path
    graph: onnx.ModelProto
    """Without its weights, which are in files beside `path`."""
    ends: tuple[str, ...]
    """The value that each part ends with."""

    @classmethod
    def of(cls, bundle: Bundle) -> "Parts":
        """Linear layers read their inputs as they are. Raises BundleError where the graph has no such ends."""
        path, row = runnable(bundle), bundle.manifest.export.quantization
        model = load_onnx(path)
        if row and (edits := way_of(row).exact()):
            Sequential(*edits)(model)
        graph = ir.to_proto(model)
        last = {node.name.rpartition("/")[0]: node.output[0] for node in graph.graph.node}
        modules = ["embed", *(f"layers.{i}" for i in range(bundle.manifest.decoder().num_layers))]
        if lacking := [module for module in modules if module not in last]:
            raise BundleError(f"{path}: no node of it is called {lacking[0]}/…", hint=AGAIN)
        return cls(path, graph, (*(last[module] for module in modules), "logits"))

    def run(self, number: int, given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """What a part ends with for what the whole graph is given, and for `x`, what the part before ended with. Its
        weights are in memory until then.

        Raises BackendError where ONNX Runtime does not load or run it.
        """
        before = self.ends[number - 1] if number else ""
        part = _between(self.graph, before, self.ends[number])
        feeds = {value.name: given["x" if value.name == before else value.name] for value in part.graph.input}
        try:
            session = open_session(part.SerializeToString(), data=self.path.parent, prepacked=False, spoken=False)
            out: NDArray[Any] = session.run(None, feeds)[0]
        except BackendError:
            raise
        except Exception as cause:  # ONNX Runtime's errors share no base class of their own
            raise failure("run", self.path, cause) from cause
        return out.copy()  # what ONNX Runtime gave holds all memory that the session took


def _between(model: onnx.ModelProto, start: str, end: str) -> onnx.ModelProto:
    """The nodes that make the value `end` of the value `start` and of inputs, with the weights that they read."""
    graph, made = model.graph, {name: node for node in model.graph.node for name in node.output}
    wanted, read = [end], {end}
    while wanted:
        name = wanted.pop()
        if name in made and name != start:
            wanted += (inner := set(made[name].input) - read)
            read |= inner
    nodes = [node for node in graph.node if not read.isdisjoint(node.output) and start not in node.output]
    types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    inputs = [types[start]] if start else []
    inputs += [value for value in graph.input if value.name in read]
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    part = onnx.helper.make_graph(nodes, "part", inputs, [types[end]], weights)
    return onnx.helper.make_model(
        part, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )
