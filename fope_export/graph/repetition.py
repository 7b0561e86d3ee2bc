"""A decoder's graph from its first layers: what torch makes of the third is repeated for all that follow."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import msgspec
import onnx_ir as ir
from torch import Tensor, nn

from fope_export.graph.passes import SCOPES
from fope_export.model.decoder import Block, Decoder

TRACED = 3
"""Layers that are traced. What the third reads of the second, each reads of the one before; else it reads the first."""
ORIGINAL = "pkg.torch.onnx.original_node_name"
"""Where torch.onnx leaves its name of an input, a tensor or an output."""
OWNED = re.compile(r"(layers|past_key_values)_(\d+)_")
LAYER = re.compile(r"\b(layers|past_key_values|present)\.(\d+)\b")


def repeats(model: Decoder) -> bool:
    """Whether all layers are made alike, and there are more than are traced."""
    owner: dict[int, int] = {}
    made, owned = set[str](), list[list[int | str]]()
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        tensors = _tensors(block)
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        kinds = [(name, type(module).__name__) for name, module in block.named_modules()]
        made.add(repr((kinds, shapes, block.attention.rotary.config)))
        first = [owner.setdefault(id(tensor), i) for tensor in tensors.values()]
        owned.append(["its own" if number == i else number for number in first])
    others = owned[TRACED - 1 :]
    return len(owned) > TRACED and len(made) == 1 and all(each == others[0] for each in others)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def first_layers(model: Decoder) -> Decoder:
    """A decoder of the layers that are traced, whose tensors are those of `model`."""
    made, experts = model.sharing(), model.config.experts
    if experts:
        experts = msgspec.structs.replace(experts, layers=tuple(i for i in experts.layers if i < TRACED))
    made.layers = made.layers[:TRACED]
    made.config = msgspec.structs.replace(model.config, num_layers=TRACED, experts=experts)
    return made


def repeat(graph: ir.Graph, model: Decoder) -> None:
    """Give a graph that torch made of `first_layers(model)` the other layers of `model`: the third's nodes, inputs,
    outputs and tensors, again and again, with everything in the order that a trace of all of them has.
    """
    last, tensors = TRACED - 1, _tensors(model)
    second, third = ([node for node in graph if _layer(_scopes(node)) == i] for i in (last - 1, last))
    given = [value for value in (*graph.inputs, *graph.initializers.values()) if _layer(value.name) == last]
    outside = [(node, i) for value in _made(third) for node, i in value.uses() if _layer(_scopes(node)) != last]
    layers = [{value: value for value in (*given, *_made(third))}]
    tail = third[-1]
    for number in range(TRACED, len(model.layers)):
        known = dict(zip(_made(second), (layers[-1][value] for value in _made(third)), strict=True))
        known |= {value: _like(value, number, tensors) for value in given}
        copies = [_copied(node, number, known) for node in third]
        graph.insert_after(tail, copies)
        tail = copies[-1]
        layers.append(known)
    for value in graph.outputs:
        for number, layer in enumerate(layers[1:], start=1):
            if value in layer:
                _name_as_torch(layer[value], value, number, third)
    logits = graph.outputs[0]
    _name_as_torch(logits, logits, len(layers) - 1, third)
    for node, i in outside:
        read = node.inputs[i]
        assert read is not None
        node.replace_input_with(i, layers[-1][read])
    graph.inputs[:] = _spread(graph.inputs, layers)
    graph.outputs[:] = _spread(graph.outputs, layers)
    ordered = _spread(graph.initializers.values(), layers)
    graph.initializers.clear()
    for value in ordered:
        graph.register_initializer(value)


def _layer(name: str | None) -> int:
    """The layer in a name or scope; -1 for what is outside of all."""
    found = LAYER.search(name or "")
    return int(found[2]) if found else -1


def _scopes(node: ir.Node) -> str:
    return node.metadata_props.get(SCOPES, "")


def _made(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _renamed(name: str, number: int) -> str:
    """For another layer."""
    return LAYER.sub(rf"\g<1>.{number}", name) if LAYER.search(name) else f"{name}.again.{number}"


def _like(value: ir.Value, number: int, tensors: Mapping[str, Tensor]) -> ir.Value:
    """Another layer's value of the same kind; an initializer has that layer's numbers."""
    assert value.name
    made = ir.Value(name=_renamed(value.name, number), shape=value.shape, type=value.type)
    made.metadata_props.update(value.metadata_props)
    made.metadata_props[ORIGINAL] = OWNED.sub(rf"\g<1>_{number}_", value.metadata_props.get(ORIGINAL, ""))
    if (tensor := value.const_value) is not None:
        made.const_value = type(tensor)(tensors[made.name or ""].detach(), name=made.name)  # type: ignore[call-arg]
    return made


def _name_as_torch(made: ir.Value, value: ir.Value, further: int, layer: Sequence[ir.Node]) -> None:
    """Let an output `made` be called as torch calls what stands so many layers `further` than `value`: it counts the
    results of each operator, of which a `layer` has some.
    """
    kind, _, number = value.metadata_props.get(ORIGINAL, "").rpartition("_")
    count = sum(re.fullmatch(rf"node_{kind}_\d+", node.name or "") is not None for node in layer)
    made.metadata_props.update(value.metadata_props)
    made.metadata_props[ORIGINAL] = f"{kind}_{int(number) + further * count}"


def _copied(node: ir.Node, number: int, known: dict[ir.Value, ir.Value]) -> ir.Node:
    """The node for another layer; what it makes becomes known."""
    made = ir.Node(
        node.domain, node.op_type, [known.get(value, value) if value else None for value in node.inputs],
        node.attributes.values(), overload=node.overload, num_outputs=len(node.outputs), version=node.version,
        name=_renamed(node.name or "", number), metadata_props={**node.metadata_props},
    )  # fmt: skip
    made.metadata_props[SCOPES] = _renamed(_scopes(node), number)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name, new.shape, new.type = _renamed(old.name or "", number), old.shape, old.type
        known[old] = new
    return made


def _spread(values: Iterable[ir.Value], layers: Sequence[Mapping[ir.Value, ir.Value]]) -> list[ir.Value]:
    """Values with the third layer's followed by those of the others."""
    ordered: list[ir.Value] = []
    for known, run in groupby(values, key=layers[0].__contains__):
        ordered += (together := list(run))
        if known:
            ordered += [layer[value] for layer in layers[1:] for value in together]
    return ordered
