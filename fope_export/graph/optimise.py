"""A second file of the model for ONNX Runtime alone: the same weights, in the operators that it runs fastest.

Three things change, and no number. Attention and cache become one operator that writes new keys and values in place
(com.microsoft's GroupQueryAttention; the rotation stays FoPE's own, outside it). The rotation's series is computed for
all layers at once. Logits are computed for each row's last tokens only.

L layers, B batch, S new tokens, T tokens in total, H query heads, K key-value heads, E head_dim, R rotary_dim, D kept
frequencies, F rotated pairs, G coefficient groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassError, PassResult, PreconditionError, Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from fope_export.bundle import KEPT, MODEL, OPTIMISED, Bundle
from fope_export.errors import ConfigError, ExportError
from fope_export.fope import contract
from fope_export.graph.companions import for_genai
from fope_export.graph.export import check
from fope_export.graph.passes import NUMBERS
from fope_export.graph.quantise import INT8, OPERATOR, Products

MICROSOFT = "com.microsoft"
CAPACITY = "capacity"
"""A cache's room for tokens."""
NOWHERE = 1 << 40
"""An index that no axis has."""


@dataclass(frozen=True)
class Layer:
    """The nodes of one layer between its projections, as this package writes them."""

    rotary: ir.Node
    attention: ir.Node
    key: ir.Node  # Concat of past and new
    value: ir.Node
    v: ir.Value  # [B, S, K, E]
    out: ir.Value  # [B, S, H * E], what attention's projection reads

    @classmethod
    def around(cls, rotary: ir.Node) -> "Layer":
        q, k = (_reader(value, "Transpose").outputs[0] for value in rotary.outputs)
        attention, key = _reader(q, "Attention"), _reader(k, "Concat")
        value = _maker(attention.inputs[2], "Concat")
        v = _maker(value.inputs[1], "Transpose").inputs[0]
        out = _reader(_reader(attention.outputs[0], "Transpose").outputs[0], "Reshape").outputs[0]
        assert v is not None
        return cls(rotary, attention, key, value, v, out)

    @property
    def name(self) -> str:
        """The attention's path."""
        return (self.rotary.name or "").partition(".rotary/")[0]

    def setting(self, name: str) -> Any:
        return self.rotary.attributes[name].value

    def numbers(self) -> list[NDArray[np.float32]]:
        """freq [D], sin_coef and cos_coef [G, D, F]."""
        found = [value.const_value for value in (self.rotary.inputs[port] for port in NUMBERS) if value is not None]
        return [tensor.numpy() for tensor in found if tensor is not None]

    def weights(self) -> list[NDArray[np.float32]]:
        """What D sines (cosines) and a 1 are multiplied by, [D + 1, G * R / 2] each: coefficients, then pads."""
        _, *coefs = self.numbers()
        groups, count, pairs = coefs[0].shape
        made = []
        for coef, pad in zip(coefs, ("sin_pad", "cos_pad"), strict=True):
            weight = np.zeros((count + 1, groups, self.setting("rotary_dim") // 2), np.float32)
            weight[:count, :, :pairs] = coef.transpose(1, 0, 2)
            weight[count, :, pairs:] = self.setting(pad)
            made.append(weight.reshape(count + 1, -1))
        return [made[0] * np.float32(self.setting("sign")), made[1]]


def _reader(value: ir.Value, op_type: str) -> ir.Node:
    """The one node of its kind that reads `value`."""
    found = [node for node, _ in value.uses() if node.op_type == op_type]
    if len(found) != 1:
        raise PreconditionError(f"{value.name} is read by {len(found)} {op_type} nodes, expected one")
    return found[0]


def _maker(value: ir.Value | None, *op_types: str) -> ir.Node:
    """The node of one of these kinds that makes `value`."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in op_types:
        raise PreconditionError(f"{value.name if value else 'nothing'} is not made by {' or '.join(op_types)}")
    return node


class Optimise(InPlacePass):
    """Rewrite a decoder with a dynamic cache. Its names of inputs and outputs stay; `logits_to_keep` joins them.

    A cache may be longer than the tokens in it: past and present are then the same memory. Rows of different lengths
    are padded on the right; a prompt that is padded anywhere else makes the run fail.
    """

    def call(self, model: ir.Model) -> PassResult:
        self.graph, self.shapes = model.graph, dict[int, ir.Value]()
        layers = [Layer.around(node) for node in model.graph if node.domain == contract.DOMAIN]
        if not layers:
            raise PreconditionError("the model has no rotation")
        self.inputs = {value.name: value for value in model.graph.inputs}
        self._steps()
        tables = self._tables(layers)
        for layer, table in zip(layers, tables, strict=True):
            self._attend(layer, *table)
        self._last_logits()
        model.opset_imports[MICROSOFT] = 1
        del model.opset_imports[contract.DOMAIN]
        model.functions.clear()
        return PassResult(model, modified=True)

    def _ops(
        self, name: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node, whose kind is what its name ends in, up to a full stop."""
        kind = name.rpartition("/")[2].partition(".")[0]
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}.{i}"
        self.graph.append(node)
        return node.outputs

    def _op(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The same of a node with one output."""
        return self._ops(name, *inputs, **attributes)[0]

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _numbers(self, *numbers: int) -> ir.Value:
        return self._constant(f"numbers.{'_'.join(map(str, numbers))}", np.array(numbers, np.int64))

    def _steps(self) -> None:
        """What all layers share: the sizes B and S, the last slot that each row writes, and the longest row's length.

        New tokens that are padding are written too, after the real ones: those that come next overwrite them.
        """
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        self.rows = self._op("steps/Shape", ids, start=0, end=1)
        self.new = self._op("steps/Shape.new", ids, start=1, end=2)
        total = self._op("steps/Shape.total", mask, start=1, end=2)
        before = self._op("steps/Sub", total, self.new)
        self.fed = self._op("steps/Slice", mask, before, total, self._numbers(1))  # [B, S], the new tokens' mask
        self.counts = self._op("steps/ReduceSum.fed", self.fed, self._numbers(1))  # [B, 1]
        lengths = self._op("steps/ReduceSum", mask, self._numbers(1))
        past = self._op("steps/Sub.past", lengths, self.counts)
        last = self._op("steps/Sub.last", self._op("steps/Add", past, self.new), self._numbers(1))
        flat = self._op("steps/Reshape", last, self._numbers(-1))
        self.last_slot = self._op("steps/Cast", flat, to=int(ir.DataType.INT32))
        self.longest = self._op("steps/Cast.total", total, to=int(ir.DataType.INT32))

    def _tables(self, layers: Sequence[Layer]) -> list[tuple[ir.Value, ir.Value]]:
        """sign * S and C of every layer, each [1, B * S * G, R / 2]; one product for all that share frequencies."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, layer in enumerate(layers):
            freq, coef, _ = layer.numbers()
            alike.setdefault(
                (freq.tobytes(), coef.shape, layer.setting("rotary_dim"), layer.setting("compute_dtype")), []
            ).append(i)
        tables: dict[int, tuple[ir.Value, ir.Value]] = {}
        for turn, members in enumerate(alike.values()):
            made = self._series([layers[i] for i in members], f"series.{turn}" if turn else "series")
            tables.update(zip(members, made, strict=True))
        return [tables[i] for i in range(len(layers))]

    def _series(self, layers: Sequence[Layer], name: str) -> list[tuple[ir.Value, ir.Value]]:
        freq, coef, _ = layers[0].numbers()
        half, to = layers[0].setting("rotary_dim") // 2, layers[0].setting("compute_dtype")
        padded = half > coef.shape[2]
        distinct: dict[bytes, int] = {}
        places: list[int] = []
        stacked: tuple[list[NDArray[np.float32]], ...] = ([], [])
        for layer in layers:
            weights = layer.weights()
            places.append(distinct.setdefault(weights[0].tobytes() + weights[1].tobytes(), len(distinct)))
            if places[-1] == len(stacked[0]):
                for stack, weight in zip(stacked, weights, strict=True):
                    stack.append(weight if padded else weight[:-1])
        column = self._op(f"{name}/Reshape", self.inputs["position_ids"], self._numbers(1, -1, 1))
        positions = self._op(f"{name}/Cast", column, to=int(ir.DataType.FLOAT))
        angles = self._op(f"{name}/Mul", positions, self._constant(f"{name}.freq", freq))
        pieces = []
        for wave, stack in zip(("Sin", "Cos"), stacked, strict=True):
            basis = self._op(f"{name}/{wave}", angles)
            if padded:
                one = self._constant("numbers.one", np.array(1, np.float32))
                basis = self._op(f"{name}/Pad.{wave}", basis, self._numbers(0, 1), one, self._numbers(-1))
            table = self._op(f"{name}/MatMul.{wave}", basis, self._constant(f"{name}.{wave}", np.stack(stack)))
            table = self._op(f"{name}/Reshape.{wave}", table, self._numbers(len(stack), -1, half))
            if to != ir.DataType.FLOAT:
                table = self._op(f"{name}/Cast.{wave}", table, to=to)
            pieces.append(
                self._ops(f"{name}/Split.{wave}", table, outputs=len(stack), axis=0, num_outputs=len(stack))
                if len(stack) > 1
                else [table]
            )
        return [(pieces[0][place], pieces[1][place]) for place in places]

    def _attend(self, layer: Layer, sin: ir.Value, cos: ir.Value) -> None:
        """Rotation, cache and attention of one layer."""
        q, k = layer.rotary.inputs[:2]
        heads, kv_heads = _extent(q, 2), _extent(k, 2)
        q, k, v = self._flat(layer)
        q = self._turn(layer, "q", q, heads, sin, cos)
        k = self._turn(layer, "k", k, kv_heads, sin, cos)
        known = layer.attention.attributes
        scale = {"scale": known["scale"].value} if "scale" in known else {}
        pasts = [node.inputs[0] for node in (layer.key, layer.value)]
        out, *presents = self._ops(
            f"{layer.name}/GroupQueryAttention", q, k, v, *pasts, self.last_slot, self.longest,
            outputs=3, domain=MICROSOFT, num_heads=heads, kv_num_heads=kv_heads, **scale,
        )  # fmt: skip
        layer.out.replace_all_uses_with(out)
        for past, new, old in zip(pasts, presents, (layer.key.outputs[0], layer.value.outputs[0]), strict=True):
            assert past is not None and past.shape is not None
            past.shape = ir.Shape([*past.shape[:2], CAPACITY, past.shape[3]])
            new.name, new.shape, new.type = old.name, past.shape, old.type
            old.name = f"{old.name}.replaced"
            self.graph.outputs[self.graph.outputs.index(old)] = new

    def _flat(self, layer: Layer) -> Sequence[ir.Value | None]:
        """q, k and v, the last as [B, S, K * E]; where nothing norms q and k, all three straight off the projection."""
        split = _maker(layer.v, "Split")
        q, k = layer.rotary.inputs[:2]
        if q is not split.outputs[0] or k is not split.outputs[1]:
            return q, k, self._op(f"{layer.name}/Reshape.v", layer.v, self._numbers(0, 0, -1))
        projected = _maker(split.inputs[0], "Reshape").inputs[0]
        widths = self._numbers(*(_extent(value, 2) * _extent(value, 3) for value in split.outputs))
        return self._ops(f"{layer.name}/Split.flat", projected, widths, outputs=3, axis=-1)

    def _turn(self, layer: Layer, x: str, value: ir.Value | None, heads: int, sin: ir.Value, cos: ir.Value) -> ir.Value:
        """q or k rotated, as [B, S, H * E]. RotaryEmbedding shares one table between heads, so groups of heads with
        coefficients of their own lie along its sequence.
        """
        name, dtype, to = f"{layer.name}.rotary", layer.v.dtype, layer.setting("compute_dtype")
        assert dtype is not None
        together, width = (
            layer.setting("heads_per_group" if x == "q" else "kv_heads_per_group"),
            layer.setting("head_dim"),
        )
        turned = self._op(f"{name}/Reshape.{x}_grouped", value, self._numbers(1, -1, together * width))
        if dtype != to:
            turned = self._op(f"{name}/Cast.{x}", turned, to=to)
        turned = self._op(
            f"{name}/RotaryEmbedding.{x}", turned, cos, sin, num_heads=together,
            rotary_embedding_dim=layer.setting("rotary_dim"), interleaved=layer.setting("interleaved"),
        )  # fmt: skip
        if dtype != to:
            turned = self._op(f"{name}/Cast.{x}_turned", turned, to=int(dtype))
        return self._op(f"{name}/Reshape.{x}", turned, self._rows_of(heads * width))

    def _rows_of(self, width: int) -> ir.Value:
        """The shape [B, S, width]."""
        if width not in self.shapes:
            self.shapes[width] = self._op(f"steps/Concat.{width}", self.rows, self.new, self._numbers(width), axis=0)
        return self.shapes[width]

    def _last_logits(self) -> None:
        """Final norm and output projection see only the last tokens that each row has among the new ones.

        Where these are no ones followed by zeros in the mask, the last 1 is elsewhere than their number says: the
        gather is then sent nowhere, and ONNX Runtime ends the run.
        """
        logits = self.graph.outputs[0]
        norm = _maker(_maker(logits, "MatMul", OPERATOR).inputs[0], "RMSNormalization")
        kept = ir.Value(name=KEPT, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        kept.const_value = ir.Tensor(np.ones(1, np.int64), name=KEPT)
        self.graph.inputs.append(kept)
        self.graph.register_initializer(kept)
        zero, one = self._scalar(0), self._scalar(1)
        after = self._op("steps/Add.one", self._op("steps/Squeeze.new", self.new), one)
        places = self._op("steps/Mul", self.fed, self._op("steps/Range", one, after, one))
        whole = self._op("steps/Equal", self._op("steps/ReduceMax", places, self._numbers(1)), self.counts)
        back = self._op("steps/Neg", self._op("steps/Squeeze.kept", kept))
        index = self._op("steps/Add.index", self.counts, self._op("steps/Range.kept", back, zero, one))  # [B, kept]
        index = self._op("steps/Where", whole, self._op("steps/Clip", index, zero), self._scalar(NOWHERE))
        index = self._op("steps/Unsqueeze", index, self._numbers(-1))
        picked = self._op("padding_belongs_on_the_right/GatherND", norm.inputs[0], index, batch_dims=1)
        norm.replace_input_with(0, picked)
        assert logits.shape is not None
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])  # as by default, which GenAI goes by

    def _scalar(self, number: int) -> ir.Value:
        return self._constant(f"number.{number}", np.array(number, np.int64))


def _extent(value: ir.Value | None, axis: int) -> int:
    """A size that is part of the architecture."""
    assert value is not None and value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def optimise(bundle: Bundle, *, int8_activations: bool = True) -> Bundle:
    """Add the optimised file to a decoder's bundle, and have ONNX Runtime GenAI load it.

    `int8_activations` concerns bundles with quantised weights alone.

    Raises ConfigError for a static cache, ExportError where the file is not as this package writes it.
    """
    config, export = bundle.manifest.decoder(), bundle.manifest.export
    if export.cache == "static":
        raise ConfigError(
            f"{bundle.path} has a static cache, and what is optimised is the growing one",
            hint="Export with --cache dynamic; the optimised file then writes its cache in place.",
        )
    passes: list[InPlacePass] = [Optimise(), TopologicalSortPass(), RemoveUnusedNodesPass()]
    if int8_activations and export.quantize:
        passes.append(Products(INT8))
    try:
        model = Sequential(*passes, ShapeInferencePass())(ir.load(bundle.model)).model
    except PassError as cause:
        raise ExportError(f"{bundle.model} cannot be optimised: {cause.__cause__}", hint="Export it again.") from cause
    model.metadata_props["fope.optimised"] = bundle.manifest.files[MODEL]
    partial = bundle.path / f".{OPTIMISED}.partial"
    try:
        ir.save(model, partial)
        check(partial)
        return bundle.add({OPTIMISED: partial, **for_genai(config, export, optimised=True)})
    finally:
        partial.unlink(missing_ok=True)
