"""A second file of the model for ONNX Runtime alone: the same weights, in the operators that it runs fastest.

Three things change, and no number. Attention and cache become one operator that writes new keys and values in place
(com.microsoft's GroupQueryAttention; the rotation stays FoPE's own, outside it). The rotation's series is computed for
all layers at once. Logits are computed for each row's last tokens only.

L layers, B batch, S new tokens, T tokens in total, H query heads, K key-value heads, E head_dim, R rotary_dim, D kept
frequencies, F rotated pairs, G coefficient groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassError, PassResult, PreconditionError, Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from fope_export.bundle import Bundle
from fope_export.errors import ConfigError, ExportError, cut
from fope_export.fope import contract
from fope_export.graph.companions import for_genai
from fope_export.graph.export import check
from fope_export.graph.passes import NUMBERS
from fope_export.graph.quantise import OPERATOR
from fope_export.graph.reading import load_onnx
from fope_export.graph.ways import way_of
from fope_export.lock import TIMEOUT
from fope_export.manifest import KEPT, MODEL, OPTIMISED
from fope_export.place import OURS

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

    def groups(self) -> NDArray[np.int64]:
        """The coefficient group that each head of [q, k, v] turns by, [H + 2 * K]; -1 for values."""
        sizes = (self.setting(name) for name in ("heads_per_group", "kv_heads_per_group"))
        q, k = (np.repeat(np.arange(len(self.numbers()[1])), size) for size in sizes)
        return np.concatenate([q, k, np.full_like(k, -1)])


class Table(NamedTuple):
    """What a layer rotates by: the rows [N, R / 2] of all tokens and layers, and which of them each head reads."""

    sin: ir.Value  # sign * S
    cos: ir.Value
    rows: ir.Value  # [B * S, H + 2 * K]


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
            self._attend(layer, table)
        self._last_logits()
        self._sum_and_norm()
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
        """What all layers share: the sizes B and S, the last slot that each row writes, and the mask's length. Sizes
        come from shapes and counts from the mask, and never meet: on a GPU the ones are the host's, the others are not.

        New tokens that are padding are written too, after the real ones: those that come next overwrite them.
        """
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        self.rows = self._op("steps/Shape", ids, start=0, end=1)
        self.new = self._op("steps/Shape.new", ids, start=1, end=2)
        total = self._op("steps/Shape.total", mask, start=1, end=2)
        self.fed = self._op("steps/Slice", mask, self._op("steps/Neg", self.new), total, self._numbers(1))  # [B, S]
        self.counts = self._op("steps/ReduceSum.fed", self.fed, self._numbers(1))  # [B, 1]
        behind = self._op("steps/ReduceSum.padding", self._op("steps/Sub", self._scalar(1), self.fed), self._numbers(1))
        last = self._op("steps/Sub.last", self._op("steps/ReduceSum", mask, self._numbers(1)), self._scalar(1))
        flat = self._op("steps/Reshape", self._op("steps/Add", last, behind), self._numbers(-1))
        self.last_slot = self._op("steps/Cast", flat, to=int(ir.DataType.INT32))
        self.longest = self._op("steps/Cast.total", total, to=int(ir.DataType.INT32))

    def _tables(self, layers: Sequence[Layer]) -> list[Table]:
        """What each layer rotates by; one product for all that share frequencies."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, layer in enumerate(layers):
            freq, coef, _ = layer.numbers()
            settings = (layer.setting(name) for name in ("rotary_dim", "compute_dtype"))
            alike.setdefault((freq.tobytes(), coef.shape, *settings), []).append(i)
        tables: dict[int, Table] = {}
        for turn, members in enumerate(alike.values()):
            made = self._series([layers[i] for i in members], f"series.{turn}" if turn else "series")
            tables.update(zip(members, made, strict=True))
        return [tables[i] for i in range(len(layers))]

    def _series(self, layers: Sequence[Layer], name: str) -> list[Table]:
        """A token has one row for each group of every distinct layer, then rows that turn nothing: ONNX Runtime wants
        as many as there are heads, and values need one.
        """
        first = layers[0]
        freq, coef, _ = first.numbers()
        groups, half, to = len(coef), first.setting("rotary_dim") // 2, first.setting("compute_dtype")
        weights = [layer.weights() for layer in layers]
        keys = [sin.tobytes() + cos.tobytes() for sin, cos in weights]
        distinct = dict(zip(keys, weights, strict=True))
        still = len(distinct) * groups
        heads = [layer.groups() for layer in layers]
        width = max(still + 1, len(heads[0]))
        start = {key: i * groups for i, key in enumerate(distinct)}
        reads = [np.where(group < 0, still, group + start[key]) for key, group in zip(keys, heads, strict=True)]

        column = self._op(f"{name}/Reshape", self.inputs["position_ids"], self._numbers(-1, 1))
        angles = self._op(f"{name}/Cast", column, to=int(ir.DataType.FLOAT))
        angles = self._op(f"{name}/Mul", angles, self._constant(f"{name}.freq", freq))
        one = self._constant("numbers.one", np.array(1, np.float32))
        tables = []
        for turn, wave in enumerate(("Sin", "Cos")):
            rest = np.zeros((len(freq) + 1, (width - still) * half), np.float32)
            rest[-1] = turn  # the sine is 0, the cosine 1
            weight = np.concatenate([*(pair[turn] for pair in distinct.values()), rest], axis=1)
            basis = self._op(f"{name}/{wave}", angles)
            basis = self._op(f"{name}/Pad.{wave}", basis, self._numbers(0, 1), one, self._numbers(-1))
            table = self._op(f"{name}/MatMul.{wave}", basis, self._constant(f"{name}.{wave}", weight))
            table = self._op(f"{name}/Reshape.{wave}", table, self._numbers(-1, half))
            tables.append(table if to == ir.DataType.FLOAT else self._op(f"{name}/Cast.{wave}", table, to=to))

        return [Table(tables[0], tables[1], rows) for rows in self._read(name, column, width, reads)]

    def _read(self, name: str, tokens: ir.Value, width: int, reads: Sequence[NDArray[Any]]) -> Sequence[ir.Value]:
        """The rows [B * S, heads] of the table that each layer reads, from those of a token with `width` rows."""
        end = self._op(f"{name}/Mul.end", self._op(f"{name}/Size", tokens), self._scalar(width))
        starts = self._op(f"{name}/Range", self._scalar(0), end, self._scalar(width))
        starts = self._op(f"{name}/Unsqueeze", starts, self._numbers(1))
        every = self._op(f"{name}/Add", starts, self._constant(f"{name}.rows", np.concatenate(reads)))
        if len(reads) == 1:
            return [every]
        return self._ops(f"{name}/Split", every, outputs=len(reads), axis=1, num_outputs=len(reads))

    def _attend(self, layer: Layer, table: Table) -> None:
        """Rotation, cache and attention of one layer. Queries, keys and values stay one tensor: RotaryEmbedding shares
        a table's row between heads, so heads are its batch of single tokens, and values turn by nothing.
        """
        name, dtype, to = f"{layer.name}.rotary", layer.v.dtype, layer.setting("compute_dtype")
        assert dtype is not None
        heads, kv_heads = (_extent(value, 2) for value in (layer.rotary.inputs[0], layer.v))
        count, size = heads + 2 * kv_heads, layer.setting("head_dim")
        packed = self._op(f"{name}/Reshape.heads", self._packed(layer), self._numbers(-1, count, size))
        if dtype != to:
            packed = self._op(f"{name}/Cast", packed, to=to)
        packed = self._op(
            f"{name}/RotaryEmbedding", packed, table.cos, table.sin, table.rows, num_heads=1,
            rotary_embedding_dim=layer.setting("rotary_dim"), interleaved=layer.setting("interleaved"),
        )  # fmt: skip
        if dtype != to:
            packed = self._op(f"{name}/Cast.back", packed, to=int(dtype))
        packed = self._op(f"{name}/Reshape", packed, self._rows_of(count * size))
        known = layer.attention.attributes
        scale = {"scale": known["scale"].value} if "scale" in known else {}
        pasts = [node.inputs[0] for node in (layer.key, layer.value)]
        out, *presents = self._ops(
            f"{layer.name}/GroupQueryAttention", packed, None, None, *pasts, self.last_slot, self.longest,
            outputs=3, domain=MICROSOFT, num_heads=heads, kv_num_heads=kv_heads, **scale,
        )  # fmt: skip
        layer.out.replace_all_uses_with(out)
        for past, new, old in zip(pasts, presents, (layer.key.outputs[0], layer.value.outputs[0]), strict=True):
            assert past is not None and past.shape is not None
            past.shape = ir.Shape([*past.shape[:2], CAPACITY, past.shape[3]])
            new.name, new.shape, new.type = old.name, past.shape, old.type
            old.name = f"{old.name}.replaced"
            self.graph.outputs[self.graph.outputs.index(old)] = new

    def _packed(self, layer: Layer) -> ir.Value | None:
        """Queries, keys and values one after the other: the projection itself, where nothing norms q and k."""
        q, k = layer.rotary.inputs[:2]
        split = _maker(layer.v, "Split")
        if q is split.outputs[0] and k is split.outputs[1]:
            return _maker(split.inputs[0], "Reshape").inputs[0]
        return self._op(f"{layer.name}.rotary/Concat", q, k, layer.v, axis=2)

    def _rows_of(self, width: int) -> ir.Value:
        """The shape [B, S, width]."""
        if width not in self.shapes:
            self.shapes[width] = self._op(f"steps/Concat.{width}", self.rows, self.new, self._numbers(width), axis=0)
        return self.shapes[width]

    def _last_logits(self) -> None:
        """Final norm and output projection see only some of the new tokens: those that are `logits_to_keep` from each
        row's end, -1 being its last.

        Where these are no ones followed by zeros in the mask, the last 1 is elsewhere than their number says: the
        gather is then sent nowhere, and ONNX Runtime ends the run.
        """
        logits = self.graph.outputs[0]
        norm = _maker(_maker(logits, "MatMul", OPERATOR).inputs[0], "RMSNormalization")
        kept = ir.Value(name=KEPT, shape=ir.Shape(["kept"]), type=ir.TensorType(ir.DataType.INT64))
        kept.const_value = ir.Tensor(np.array([-1]), name=KEPT)
        self.graph.inputs.append(kept)
        self.graph.register_initializer(kept)
        zero, one = self._scalar(0), self._scalar(1)
        after = self._op("steps/Add.one", self._op("steps/Squeeze", self.new), one)
        places = self._op("steps/Mul", self.fed, self._op("steps/Range", one, after, one))
        whole = self._op("steps/Equal", self._op("steps/ReduceMax", places, self._numbers(1)), self.counts)
        index = self._op("steps/Clip", self._op("steps/Add.index", self.counts, kept), zero)  # [B, kept]
        index = self._op("steps/Where", whole, index, self._scalar(NOWHERE))
        index = self._op("steps/Unsqueeze", index, self._numbers(-1))
        picked = self._op("padding_belongs_on_the_right/GatherND", norm.inputs[0], index, batch_dims=1)
        norm.replace_input_with(0, picked)
        assert logits.shape is not None
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])  # as by default, which GenAI goes by

    def _sum_and_norm(self) -> None:
        """A residual sum and the norm that reads it are one operator."""
        for norm in [node for node in self.graph if node.op_type == "RMSNormalization"]:
            total, weight = norm.inputs
            add = total.producer() if total is not None else None
            if add is None or add.op_type != "Add" or any(x is None or x.is_initializer() for x in add.inputs):
                continue
            assert total is not None and total.name and norm.name
            kind = "SkipSimplifiedLayerNormalization"
            normed, *_, new = self._ops(
                f"{norm.name.rpartition('/')[0]}/{kind}", *add.inputs, weight, outputs=4, domain=MICROSOFT,
                epsilon=norm.attributes["epsilon"].value,
            )  # fmt: skip
            norm.outputs[0].replace_all_uses_with(normed)
            total.replace_all_uses_with(new)

    def _scalar(self, number: int) -> ir.Value:
        return self._constant(f"number.{number}", np.array(number, np.int64))


def _extent(value: ir.Value | None, axis: int) -> int:
    """A size that is part of the architecture."""
    assert value is not None and value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _save(model: ir.Model, path: Path) -> None:
    try:
        ir.save(model, path)
    except ir.serde.SerdeError as cause:  # what a damaged file brought along
        raise ExportError(
            f"{path.name} cannot be written: {cut(cause)}", hint="Export the checkpoint again."
        ) from cause


def optimise(bundle: Bundle, *, int8_activations: bool = True, lock_timeout: float = TIMEOUT) -> Bundle:
    """Add the optimised file to a decoder's bundle, and have ONNX Runtime GenAI load it.

    `int8_activations` concerns bundles with quantised weights alone. Another writer of the bundle is waited for, for
    `lock_timeout` seconds.

    Raises ConfigError for a static cache, ExportError where the file is not as this package writes it.
    """
    with bundle.changing(lock_timeout) as now:
        return _optimised(now, int8_activations)


def _optimised(bundle: Bundle, int8_activations: bool) -> Bundle:
    config, export = bundle.manifest.decoder(), bundle.manifest.export
    if export.cache == "static":
        raise ConfigError(
            f"{bundle.path} has a static cache, and what is optimised is the growing one",
            hint="Export with --cache dynamic; the optimised file then writes its cache in place.",
        )
    passes: list[InPlacePass] = [Optimise(), TopologicalSortPass(), RemoveUnusedNodesPass()]
    if int8_activations and export.quantization:
        passes += way_of(export.quantization).fast()
    portable = bundle.model
    try:
        model = Sequential(*passes, ShapeInferencePass())(load_onnx(portable)).model
    except PassError as cause:
        raise ExportError(f"{bundle.model} cannot be optimised: {cause.__cause__}", hint="Export it again.") from cause
    model.metadata_props["fope.optimised"] = bundle.manifest.files[MODEL]
    partial = portable.with_name(f"{OURS}{OPTIMISED}")  # beside its weights
    try:
        _save(model, partial)
        check(partial)
        return bundle.put({OPTIMISED: partial, **for_genai(config, export, optimised=True)})
    finally:
        partial.unlink(missing_ok=True)
