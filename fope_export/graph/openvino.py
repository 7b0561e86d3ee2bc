"""A decoder's graph as OpenVINO's own intermediate representation (IR): its cache is a state, as OpenVINO GenAI and
optimum-intel want it, and its tokenizer is a graph too.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, TopologicalSortPass

from fope_export.bundle import Bundle
from fope_export.dtypes import DTYPES, FP32
from fope_export.errors import ConfigError, ExportError, cut, require
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.parting import PartProducts, StoreByResult
from fope_export.graph.passes import CastBFloat16ToFloat32
from fope_export.graph.steps import SCOPE, decoder_inputs
from fope_export.graph.turning import TurnApart
from fope_export.manifest import OPENVINO
from fope_export.tokens import Tokenizer

PAST, PRESENT = "past_key_values", "present"
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files of the bundle that go with it where they are there."""
SAMPLES = ("def main():\n\treturn 'naïve…' + \"日本\"\n", " a  b\r\n\r\n1234567 ", "isn't , right ?")
NUMBERED = re.compile(r'(?<=[",])([A-Z]\w*)_\d+(?=[.",])')
"""Names that OpenVINO gives."""
SEVERAL = re.compile(r'(?<=names=")[^"]*,[^"]*(?=")')
"""Names of one port, which are a set."""
NEVER = "\U0010ffff\U0010fffe"
"""Characters that no text has."""
WITHOUT = "Take tokenizer.json out of the checkpoint and export again: the bundle then takes and gives token ids alone."
PRECISE = {"name": "precise", "version": "0"}
"""The attribute by which OpenVINO keeps an operation's precision when the others are computed in half types."""


class TakeSizesFromTokens(Pass):
    """Take from the tokens what the graph takes from its cache's shape: a state may be of any, and pages have none."""

    def requires(self, model: ir.Model) -> None:
        decoder_inputs(model)

    def call(self, model: ir.Model) -> PassResult:
        inputs, found = decoder_inputs(model), list(_sizes_of_cache(model))
        for node in found:
            builder = GraphBuilder(model).within(SCOPE, before=node)
            rows = builder.op("Shape", inputs["input_ids"], start=0, end=1)
            new = builder.op("Shape", inputs["input_ids"], name="new", start=1, end=2)
            total = builder.op("Shape", inputs["attention_mask"], name="total", start=1, end=2)
            past = builder.op("Sub", total, new, name="past")
            node.outputs[0].replace_all_uses_with(past if node.attributes["start"].as_int() else rows)
            builder.remove(node)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if left := next(_sizes_of_cache(model), None):
            raise PostconditionError(f"{left.name} takes a size from the cache")


def _sizes_of_cache(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes that take one from the shape of a cache: its rows, or its tokens."""
    for value in model.graph.inputs:
        if (value.name or "").startswith(PAST):
            yield from (node for node, _ in value.uses() if node.op_type == "Shape")


class RepeatHeads(Pass):
    """Give attention as many heads of keys and values as of queries, in the form by which OpenVINO knows that it need
    not copy them.
    """

    def requires(self, model: ir.Model) -> None:
        for node in _attentions(model):
            if any(value is None or value.shape is None or value.shape.rank() != 4 for value in node.inputs[:3]):
                raise PreconditionError(f"{node.name} reads what has no shape [B, heads, S, E]")

    def call(self, model: ir.Model) -> PassResult:
        grouped = [node for node in _attentions(model) if _heads(node, 0) != _heads(node, 1)]
        for node in grouped:
            builder = GraphBuilder(model).within(node.name or "", before=node)
            times = _heads(node, 0) // _heads(node, 1)
            for port, name in ((1, "keys"), (2, "values")):
                value = node.inputs[port]
                assert value is not None
                apart = builder.op("Unsqueeze", value, builder.integers(2), name=name)
                repeated = builder.op("Expand", apart, builder.integers(1, 1, times, 1, 1), name=name)
                shape = builder.integers(0, _heads(node, 0), -1, _extent(node, port, 3))
                together = builder.op("Reshape", repeated, shape, name=name)
                together.shape, together.type = ir.Shape([None, _heads(node, 0), None, None]), value.type
                node.replace_input_with(port, together)
        return PassResult(model, modified=bool(grouped))

    def ensures(self, model: ir.Model) -> None:
        for node in _attentions(model):
            if len({_heads(node, port) for port in range(3)}) > 1:
                raise PostconditionError(f"{node.name} has fewer heads of keys or values than of queries")


def _attentions(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == "Attention")


def _heads(node: ir.Node, port: int) -> int:
    return _extent(node, port, 1)


def _extent(node: ir.Node, port: int, axis: int) -> int:
    value = node.inputs[port]
    assert value is not None and value.shape is not None
    size = value.shape[axis]
    if not isinstance(size, int):
        raise PreconditionError(f"{value.name} has the shape {value.shape}")
    return size


def passes_for(bundle: Bundle) -> list[InPlacePass]:
    """What the portable file goes through before OpenVINO reads it.

    Raises ConfigError for a bundle that OpenVINO's caches or operators are not for.
    """
    export = bundle.manifest.export
    for reason in (
        "a static cache" if export.cache == "static" else "",
        "positions on several axes as inputs" if export.position_axes else "",
        "inputs of layers that are rounded in calibrated steps" if export.calibrated else "",
        f"{row.name} weights, written for TensorRT," if (row := export.quantization) and row.engines else "",
    ):
        if reason:
            raise ConfigError(
                f"{bundle.path} has {reason}, and OpenVINO's attention takes growing caches, one position a token and "
                "weights of 8 or 4 bits",
                hint="Export the checkpoint to another folder without that option.",
            )
    edits: list[InPlacePass] = [
        TakeSizesFromTokens(),
        TurnApart(),
        PartProducts(),
        StoreByResult(),
        RepeatHeads(),
        InlinePass(),
    ]
    narrow = DTYPES[export.dtype]
    wide = [] if narrow is FP32 else [CastBFloat16ToFloat32(narrow, FP32)]  # who loads it says what it computes in
    return [*edits, TopologicalSortPass(), RemoveUnusedNodesPass(), *wide]


def convert(portable: Path, folder: Path) -> None:
    """Write the IR of an ONNX file that went through `passes_for` to `folder`. Raises BackendError without OpenVINO."""
    openvino = require("openvino", "openvino")
    model = openvino.Core().read_model(portable)
    _drop_empty_parts(model)
    _make_stateful(model)
    _save(model, path := folder / Path(OPENVINO).name)
    _keep_angles(path)


def _drop_empty_parts(model: Any) -> None:
    """RotaryEmbedding comes apart into channels that turn and those that do not; where there are none of these, they
    are split off and joined again all the same, which is a copy.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "VariadicSplit" and list(node.outputs()[-1].get_partial_shape())[-1] == 0:
            turning, resting = node.outputs()
            for port in resting.get_target_inputs():
                joined = port.get_node()
                joined.output(0).replace(joined.input_value(0))
            turning.replace(node.input_value(0))


def _make_stateful(model: Any) -> None:
    """Past and present become states, whose rows `beam_idx` chooses, empty at first. The transformation is OpenVINO's;
    the names, and that each state is gathered before it grows, are what GenAI and optimum-intel look for.
    """
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = op.parameter([-1], np.int32, name="beam_idx")
    beams.output(0).set_names({"beam_idx"})
    model.add_parameters([beams])
    pasts = [port for port in model.inputs if port.get_any_name().startswith(PAST)]
    for past in pasts:
        readers = past.get_target_inputs()
        chosen = op.gather(past, beams, op.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    names = {name: name.replace(PAST, PRESENT) for name in (past.get_any_name() for past in pasts)}
    apply_make_stateful_transformation(model, names)
    rows = op.gather(op.shape_of(model.input("input_ids")), op.constant(np.array([0])), op.constant(np.int64(0)))
    for state in (node for node in model.get_ops() if node.get_type_name() == "ReadValue"):
        _, heads, _, channels = state.get_output_partial_shape(0)
        sizes = [op.constant(np.array([size])) for size in (heads.get_length(), 0, channels.get_length())]
        zero = op.constant(0.0, dtype=state.get_output_element_type(0))
        state.set_arguments([op.broadcast(zero, op.concat([rows, sizes[0], sizes[1], sizes[2]], 0))])
    model.validate_nodes_and_infer_types()


def _save(model: Any, path: Path) -> None:
    """Write a graph, its weights beside it: the same for the same graph. OpenVINO numbers what has no name by all that
    the process has made before; here that begins anew in each file.
    """
    require("openvino", "openvino").save_model(model, path, compress_to_fp16=False)
    known: dict[str, str] = {}

    def again(name: re.Match[str]) -> str:
        return known.setdefault(name[0], f"{name[1]}_{len(known)}")

    text = NUMBERED.sub(again, path.read_text("utf-8"))
    path.write_text(SEVERAL.sub(lambda names: ",".join(sorted(names[0].split(","))), text), "utf-8")


def _keep_angles(path: Path) -> None:
    """Mark what is computed from positions alone, which is angles, sines, cosines and series, so that no runtime rounds
    it: at position 1,000,000 an angle in float16 is infinite.
    """
    tree = ET.parse(path)  # noqa: S314 (OpenVINO wrote it just now)
    layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
    readers: dict[str | None, list[str | None]] = {}
    for edge in tree.iterfind("edges/edge"):
        readers.setdefault(edge.get("from-layer"), []).append(edge.get("to-layer"))

    def after(name: str, *, sizes: bool) -> set[str | None]:
        """All that an input leads to; without `sizes`, not by way of its shape."""
        found: set[str | None] = set()
        ahead = [number for number, layer in layers.items() if layer.get("name") == name]
        while ahead:
            number = ahead.pop()
            if number not in found and (sizes or layers[number].get("type") != "ShapeOf"):
                found.add(number)
                ahead += readers.get(number, [])
        return found

    for number in after("position_ids", sizes=True) - after("input_ids", sizes=False):
        layer = layers[number]
        if layer.get("type") != "Parameter":
            if (info := layer.find("rt_info")) is None:
                info = ET.Element("rt_info")
                layer.insert(int(layer.find("data") is not None), info)
            ET.SubElement(info, "attribute", PRECISE)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def write_tokenizer(bundle: Bundle, folder: Path) -> None:
    """The bundle's tokenizer and what turns tokens back into text, as graphs; nothing where it has none.

    Raises BackendError where a package is not installed, and ExportError where the converter takes it for another one.
    """
    if not (bundle.path / "tokenizer.json").exists():
        return
    openvino, transformers = require("openvino", "openvino"), require("transformers", "openvino")
    text = transformers.AutoTokenizer.from_pretrained(bundle.path, local_files_only=True)
    if not text.added_tokens_decoder:  # without any, the converter leaves out what its own operators need
        text.add_special_tokens({"additional_special_tokens": [NEVER]})
    try:
        graphs = require("openvino_tokenizers", "openvino").convert_tokenizer(text, with_detokenizer=True)
    except (RuntimeError, NotImplementedError) as cause:
        raise ExportError(f"OpenVINO Tokenizers does not take {bundle.path}'s: {cut(cause)}", hint=WITHOUT) from cause
    tokens, own = openvino.compile_model(graphs[0], "CPU"), Tokenizer(bundle.path)
    for sample in SAMPLES:
        if (ids := tokens([sample])["input_ids"].ravel().tolist()) != own.encode(sample):
            raise ExportError(
                f"OpenVINO Tokenizers makes {cut(ids)} of {sample!r}, and the tokenizer {cut(own.encode(sample))}",
                hint=WITHOUT,
            )
    for name, graph in zip(("tokenizer", "detokenizer"), graphs, strict=True):
        _save(graph, folder / f"openvino_{name}.xml")


def files_beside(bundle: Bundle) -> Iterable[str]:
    """Names of the bundle's files that describe the model and its tokenizer to other programs."""
    return [name for name in BESIDE if name in bundle.manifest.files]
