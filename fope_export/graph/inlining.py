"""The rotation written out where it is called, for readers that know no functions, and called again from that.

A call `module/FopeRotary` becomes the nodes `module/FopeRotary/value` of its function's body, each named by the value
that it makes there, so that the call can be found again. Only the names by which plugins are found are lost, and these
are always the same.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError, Sequential
from onnx_ir.passes.common import ShapeInferencePass

from fope_export.fope import contract
from fope_export.graph.base import Pass
from fope_export.graph.passes import NUMBERS
from fope_export.graph.translation import function

WRITTEN_OUT = re.compile(rf"((?:.+/)?{contract.NAME}(?:_\d+)?)/(\w+)")
"""Name of a node of a body: the call, and the value."""
Size: TypeAlias = int | ir.SymbolicDim | None
WRITTEN = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32}
"""Attributes of a Constant that are numbers, which become its `value`: a float there is one of 64 bits to some readers.
"""

SHAPES = {
    **dict.fromkeys(("sin_pad_row", "cos_pad_row"), "G 1 P"), **dict.fromkeys(("sin_rows", "cos_rows"), "G J P"),
    **dict.fromkeys(("sin_weights", "cos_weights"), "J+1 GP"), **dict.fromkeys(("sin_basis", "cos_basis"), "B S J+1"),
    **dict.fromkeys(("sin_flat", "cos_flat"), "B S GP"),
    **dict.fromkeys(("sin_grouped", "cos_grouped", "sin", "cos"), "B SG P"),
    **dict.fromkeys(("q_flat", "q_grouped", "q_turned"), "B SG QE"), "q_unflat": "B S H E",
    **dict.fromkeys(("k_flat", "k_grouped", "k_turned"), "B SG LE"), "k_unflat": "B S K E",
}  # fmt: skip
"""Of a body's values whose sizes are computed, which shape inference does not follow, while readers take two sizes that
are unknown for the same: in the letters of `contract`, with P = R / 2 pairs, and Q = H / G and L = K / G heads a group.
"""


class InlineRotary(Pass):
    """Every call of the rotation becomes its function's nodes; the model is left with standard operators alone."""

    def requires(self, model: ir.Model) -> None:
        for node in (calls := list(_calls(model.graph))):
            if node.op_identifier() not in model.functions:
                raise PreconditionError(f"{node.name} calls a function that the model lacks")
        if not calls:
            raise PreconditionError(f"the model makes no call of {contract.DOMAIN}::{contract.NAME}")

    def call(self, model: ir.Model) -> PassResult:
        for node in list(_calls(model.graph)):
            _write_out(node, model.functions[node.op_identifier()])
        model.functions.clear()
        del model.opset_imports[contract.DOMAIN]
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if model.functions or any(_calls(model.graph)):
            raise PostconditionError("a rotation is still a call")


class CallRotary(Pass):
    """The inverse of InlineRotary: the same graph as before it."""

    def requires(self, model: ir.Model) -> None:
        if not (bodies := _bodies(model.graph)):
            raise PreconditionError("no rotation is written out")
        for name, nodes in bodies.items():
            _found(name, nodes, model)

    def call(self, model: ir.Model) -> PassResult:
        for name, nodes in _bodies(model.graph).items():
            _call(name, nodes, model)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if left := next(iter(_bodies(model.graph)), None):
            raise PostconditionError(f"{left} is still written out")


def inlined(model: ir.Model) -> ir.Model:
    """The model with its rotations written out, and with the shapes of what they compute, as far as they are known."""
    sizes = {node.name: _sizes(node) for node in _calls(model.graph)}
    known = {value.name: value.shape for value in _values(model) if value.shape is not None}
    names = {size.value for shape in known.values() for size in shape if isinstance(size, ir.SymbolicDim)}
    order = list(model.graph.initializers)
    made = Sequential(InlineRotary(), ShapeInferencePass())(model).model
    for name in order:  # which shape inference changes, and weights are written in it
        made.graph.initializers[name] = made.graph.initializers.pop(name)
    for value in _values(made):
        match = WRITTEN_OUT.fullmatch(value.name or "")
        if match and match[2] in SHAPES:
            value.shape = ir.Shape([sizes[match[1]][letters] for letters in SHAPES[match[2]].split()])
        elif value.name in known:
            value.shape = known[value.name]
        elif value.shape is not None:  # without the sizes that shape inference counted itself
            of_names = (size if isinstance(size, int) or size.value in names else None for size in value.shape)
            value.shape = ir.Shape(of_names)
    return made


def _values(model: ir.Model) -> Iterator[ir.Value]:
    return chain(model.graph.inputs, (value for node in model.graph for value in node.outputs))


def called(model: ir.Model) -> ir.Model:
    """The model with those of its rotations as calls that are written out as InlineRotary does it."""
    for name, nodes in _bodies(model.graph).items():
        try:
            _call(name, nodes, model)
        except PreconditionError:
            continue
    return model


def _calls(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.domain == contract.DOMAIN)


def _write_out(call: ir.Node, body: ir.Function) -> None:
    assert call.graph is not None and call.name
    values: dict[ir.Value | None, ir.Value | None] = {None: None, **dict(zip(body.inputs, call.inputs, strict=True))}
    for template in body:
        attributes = [_told(attribute, call.attributes) for attribute in template.attributes.values()]
        name = f"{call.name}/{template.outputs[0].name}"
        node = ir.Node("", template.op_type, [values[value] for value in template.inputs], attributes, name=name)
        node.outputs[0].name = name
        values[template.outputs[0]] = node.outputs[0]
        call.graph.insert_before(call, node)
    for former, result in zip(call.outputs, body.outputs, strict=True):
        _replace(former, values[result])
    call.graph.remove(call, safe=True)


def _sizes(call: ir.Node) -> dict[str, Size]:
    """The sizes that SHAPES names, of what a call is given; None where nobody knows."""
    q, k, freq, coef = (call.inputs[port] for port in (0, 1, *NUMBERS[:2]))
    assert q and q.shape and k and k.shape and freq and freq.shape and coef and coef.shape
    (rows, tokens, heads, channels), kv_heads, groups = q.shape, k.shape[2], coef.shape[0]
    bases = 1 if len(call.inputs) == len(contract.INPUTS[contract.PLAIN]) else 2
    assert (
        isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(groups, int) and isinstance(channels, int)
    )
    pairs, terms = call.attributes["rotary_dim"].as_int() // 2, bases * freq.shape.numpy()[0]
    return {
        "B": rows, "S": tokens, "SG": tokens * groups if isinstance(tokens, int) else tokens if groups == 1 else None,
        "G": groups, "J": terms, "J+1": terms + 1, "P": pairs, "GP": groups * pairs, "1": 1,
        "H": heads, "K": kv_heads, "E": channels, "QE": heads // groups * channels, "LE": kv_heads // groups * channels,
    }  # fmt: skip


def _told(attribute: ir.Attr, told: Mapping[str, ir.Attr]) -> ir.Attr:
    """An attribute of a body's node as it is where the body is called with these attributes."""
    value = told[attribute.ref_attr_name].value if attribute.ref_attr_name else attribute.value
    if attribute.name in WRITTEN:
        return ir.AttrTensor("value", ir.Tensor(np.array(value, WRITTEN[attribute.name])))
    return ir.Attr(attribute.name, attribute.type, value)


def _replace(former: ir.Value, value: ir.Value | None) -> None:
    """Have `value` what `former` was: its name, its readers, what is known of it."""
    assert value is not None
    name, former.name = former.name, None
    value.name, value.shape, value.type = name, former.shape, former.type
    former.replace_all_uses_with(value, replace_graph_outputs=True)


def _bodies(graph: ir.Graph) -> dict[str, dict[str, ir.Node]]:
    """Call -> its nodes, by the value that each makes."""
    bodies: dict[str, dict[str, ir.Node]] = {}
    for node in graph:
        if match := WRITTEN_OUT.fullmatch(node.name or ""):
            bodies.setdefault(match[1], {})[match[2]] = node
    return bodies


def _found(
    name: str, nodes: Mapping[str, ir.Node], model: ir.Model
) -> tuple[ir.Function, dict[str, ir.Value], dict[str, float]]:
    """The body that the nodes of a call are, what they read as its inputs, and what they were told.

    Raises PreconditionError where they are no body.
    """
    versions = {version: function(model.opset_imports[""], version) for version in contract.VERSIONS}
    body = next((each for each in versions.values() if [node.outputs[0].name for node in each] == [*nodes]), None)
    if body is None:
        raise PreconditionError(f"{name} has the nodes of no {contract.NAME}")
    values: dict[ir.Value, ir.Value | None] = {}
    told: dict[str, float] = {}
    for template, node in zip(body, nodes.values(), strict=True):
        if node.op_type != template.op_type or node.domain or not _alike(template, node, values, told):
            raise PreconditionError(f"{node.name} is not as in {contract.NAME}")
    inputs = {value.name or "": read for value in body.inputs if (read := values[value]) is not None}
    return body, inputs, told


def _alike(template: ir.Node, node: ir.Node, values: dict[ir.Value, ir.Value | None], told: dict[str, float]) -> bool:
    """Whether a node reads and says what the body's does, given what others before it read, made and were told."""
    pairs = chain(zip(template.inputs, node.inputs, strict=False), zip(template.outputs, node.outputs, strict=False))
    if len(template.inputs) != len(node.inputs) or any(
        values.setdefault(ours, theirs) is not theirs for ours, theirs in pairs if ours is not None
    ):
        return False
    for attribute in template.attributes.values():
        said = node.attributes.get("value" if attribute.name in WRITTEN else attribute.name)
        if said is None:
            return False
        if attribute.ref_attr_name:
            value = said.value.numpy().item() if attribute.name in WRITTEN else said.value
            if told.setdefault(attribute.ref_attr_name, value) != value:
                return False
        elif not _equal(_told(attribute, {}), said):
            return False
    return True


def _equal(wanted: ir.Attr, said: ir.Attr) -> bool:
    if wanted.type != said.type:
        return False
    if wanted.type == ir.AttributeType.TENSOR:
        return bool(np.array_equal(wanted.value.numpy(), said.value.numpy()))
    return bool(wanted.value == said.value)


def _call(name: str, nodes: Mapping[str, ir.Node], model: ir.Model) -> None:
    """Replace the nodes of a call by it. Raises PreconditionError as `_found` does."""
    body, inputs, told = _found(name, nodes, model)
    version = next(each for each in contract.VERSIONS if len(contract.INPUTS[each]) == len(body.inputs))
    node = ir.node(
        contract.NAME, [inputs[port.name] for port in contract.INPUTS[version]],
        {**{key: told[key] for key in contract.ATTRIBUTES}, **contract.DISPATCH[version]},
        domain=contract.DOMAIN, num_outputs=len(contract.OUTPUTS), name=name,
    )  # fmt: skip
    model.graph.insert_before(next(iter(nodes.values())), node)
    for port, value in zip(contract.OUTPUTS, node.outputs, strict=True):
        _replace(nodes[port.name].outputs[0], value)
    model.graph.remove(nodes.values(), safe=True)
    model.functions[body.identifier()] = body
    model.opset_imports[contract.DOMAIN] = version
