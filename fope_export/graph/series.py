"""One series for all layers: what a decoder's rotations turn by is computed once, in one product.

D kept frequencies, J rows of coefficients, F rotated pairs, G coefficient groups, R rotary_dim; otherwise as in the
pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from fope_export.fope import contract
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder, maker, reader, source
from fope_export.graph.passes import AXIS, NUMBERS, POSITIONS
from fope_export.graph.steps import SCOPE, Steps, decoder_inputs, steps

WAVES = ("Sin", "Cos")


@dataclass(frozen=True)
class Rotation:
    """A rotation before attention, as this package writes them."""

    node: ir.Node
    values: ir.Node  # Transpose of what attention's values are
    v: ir.Value  # [B, S, K, E], which it reads

    @classmethod
    def around(cls, node: ir.Node) -> "Rotation":
        """Raises PreconditionError where the graph is another."""
        q, k = (reader(value, "Transpose").outputs[0] for value in node.outputs)
        reader(k, "Concat")
        cached = maker(reader(q, "Attention").inputs[2], "Concat")
        values = maker(cached.inputs[1], "Transpose")
        return cls(node, values, source(cached.inputs[1], "Transpose"))

    @property
    def path(self) -> str:
        """The attention's."""
        return (self.node.name or "").partition(".rotary/")[0]

    def setting(self, name: str) -> Any:
        return self.node.attributes[name].value

    def numbers(self) -> list[NDArray[np.float32]]:
        """freq [D], sin_coef and cos_coef [G, J, F]."""
        return [self._constant(port) for port in NUMBERS]

    @property
    def axis(self) -> NDArray[np.int64] | None:
        """[D]; None where all tokens have one position."""
        return self._constant(AXIS) if len(self.node.inputs) > AXIS else None

    def _constant(self, port: int) -> NDArray[Any]:
        value = self.node.inputs[port]
        if value is None or value.const_value is None:
            raise PreconditionError(f"{self.node.name} reads numbers that are no initializers")
        return value.const_value.numpy()

    @property
    def spectrum(self) -> object:
        """Equal where series are of the same waves, alike in shape and dtype."""
        freq, coef, _ = self.numbers()
        settings = (self.setting(name) for name in ("rotary_dim", "compute_dtype"))
        return freq.tobytes(), None if self.axis is None else self.axis.tobytes(), coef.shape, *settings

    def weights(self) -> list[NDArray[np.float32]]:
        """What J sines or cosines and a 1 are multiplied by, [J + 1, G * R / 2] each: coefficients, then pads."""
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

    def heads(self) -> tuple[int, int]:
        """H and K, which are part of the architecture."""
        extents = [value.shape[2] for value in (self.node.inputs[0], self.v) if value is not None and value.shape]
        heads, kv_heads = extents
        assert isinstance(heads, int) and isinstance(kv_heads, int)
        return heads, kv_heads


class Table(NamedTuple):
    """What a layer rotates by: the rows [N, R / 2] of all tokens and layers, and which of them each head reads."""

    sin: ir.Value  # sign * S
    cos: ir.Value
    rows: ir.Value  # [B * S, H + 2 * K]


def rotations(model: ir.Model) -> list[Rotation]:
    """All of a decoder's. Raises PreconditionError where there is none, or one is not as this package writes them."""
    calls = [Rotation.around(node) for node in model.graph if node.domain == contract.DOMAIN]
    if not calls:
        raise PreconditionError("the model has no rotation")
    return calls


class ShareSeries(Pass):
    """Rotations become RotaryEmbedding on rows of one table: the series is computed for all layers at once.

    Queries, keys and values of a layer, B batch, S tokens, H and K heads, E head_dim, are turned as one tensor
    [B, S, (H + 2 * K) * E], and then split again. The function that the rotations called leaves the model.
    """

    def requires(self, model: ir.Model) -> None:
        decoder_inputs(model)
        rotations(model)

    def call(self, model: ir.Model) -> PassResult:
        step, layers = steps(model), rotations(model)
        builder = GraphBuilder(model)
        for layer, table in zip(layers, _tables(builder, layers, step), strict=True):
            _turn(builder, layer, table, step)
        return without_function(model)

    def ensures(self, model: ir.Model) -> None:
        ensure_no_call(model)


def without_function(model: ir.Model) -> PassResult:
    """A model that calls the rotations' function no more."""
    del model.opset_imports[contract.DOMAIN]
    model.functions.clear()
    return PassResult(model, modified=True)


def ensure_no_call(model: ir.Model) -> None:
    """Raises PostconditionError where a rotation is still a call."""
    if contract.DOMAIN in model.opset_imports or any(node.domain == contract.DOMAIN for node in model.graph):
        raise PostconditionError("a rotation is still a call")


def _tables(builder: GraphBuilder, layers: Sequence[Rotation], step: Steps) -> list[Table]:
    """What each layer rotates by; one product for all that share frequencies."""
    alike: dict[object, list[int]] = {}
    for i, layer in enumerate(layers):
        alike.setdefault(layer.spectrum, []).append(i)
    tables: dict[int, Table] = {}
    for turn, members in enumerate(alike.values()):
        made = _series(builder.within(f"series.{turn}" if turn else "series"), [layers[i] for i in members], step)
        tables.update(zip(members, made, strict=True))
    return [tables[i] for i in range(len(layers))]


def _series(builder: GraphBuilder, layers: Sequence[Rotation], step: Steps) -> list[Table]:
    """A token has one row for each group of every distinct layer, then rows that turn nothing: ONNX Runtime wants as
    many as there are heads, and values need one.
    """
    groups, half = len(layers[0].numbers()[1]), layers[0].setting("rotary_dim") // 2
    weights = [layer.weights() for layer in layers]
    keys = [sin.tobytes() + cos.tobytes() for sin, cos in weights]
    distinct = dict(zip(keys, weights, strict=True))
    still = len(distinct) * groups
    heads = [layer.groups() for layer in layers]
    width = max(still + 1, len(heads[0]))
    start = {key: i * groups for i, key in enumerate(distinct)}
    reads = [np.where(group < 0, still, group + start[key]) for key, group in zip(keys, heads, strict=True)]

    tables = []
    for turn, wave in enumerate(waves(builder, layers[0])):
        rest = np.zeros((len(weights[0][0]), (width - still) * half), np.float32)
        rest[-1] = turn  # the sine is 0, the cosine 1
        weight = np.concatenate([*(pair[turn] for pair in distinct.values()), rest], axis=1)
        table = mixed(builder, WAVES[turn], wave, weight)
        table = builder.op("Reshape", table, builder.integers(-1, half), name=WAVES[turn])
        tables.append(computed_in(builder, table, layers[0].setting("compute_dtype"), WAVES[turn]))
    return [Table(tables[0], tables[1], rows) for rows in _read(builder, step.tokens, width, reads)]


def waves(builder: GraphBuilder, layer: Rotation) -> Iterator[ir.Value]:
    """The sines and cosines of N tokens that a layer's two series mix, and a 1: [N, J + 1] each."""
    freq, coef, _ = layer.numbers()
    angles = builder.op("Cast", _positions(builder, layer), to=int(ir.DataType.FLOAT))
    angles = builder.op("Mul", angles, builder.constant(f"{builder.scope}.freq", freq))
    one = builder.constant("numbers.one", np.array(1, np.float32))
    for wave in WAVES:
        basis = [builder.op(each, angles) for each in ((wave,) if coef.shape[1] == len(freq) else WAVES)]
        joined = basis[0] if len(basis) == 1 else builder.op("Concat", *basis, axis=1)
        yield builder.op("Pad", joined, builder.integers(0, 1), one, builder.integers(-1), name=wave)


def mixed(builder: GraphBuilder, name: str, wave: ir.Value, weight: NDArray[np.float32]) -> ir.Value:
    """Series of waves [N, J + 1]."""
    return builder.op("MatMul", wave, builder.constant(f"{builder.scope}.{name}", weight), name=name)


def computed_in(builder: GraphBuilder, value: ir.Value, dtype: int, name: str) -> ir.Value:
    """A float32 value in the dtype that rotations are computed in."""
    return value if dtype == ir.DataType.FLOAT else builder.op("Cast", value, name=name, to=dtype)


def _positions(builder: GraphBuilder, layer: Rotation) -> ir.Value:
    """The positions that frequencies turn N tokens by: [N, 1], or each its own, [N, D]."""
    inputs = decoder_inputs(builder.model)
    asked, axis = inputs["position_ids"], layer.axis
    if axis is None or layer.node.inputs[POSITIONS] is not asked:
        return builder.op("Reshape", asked, builder.integers(-1, 1))
    by_axis = builder.op("Reshape", asked, builder.integers(0, -1))
    chosen = builder.op("Gather", by_axis, builder.constant(f"{builder.scope}.axis", axis), axis=0)
    return builder.op("Transpose", chosen, perm=[1, 0])


def _read(
    builder: GraphBuilder, tokens: ir.Value, width: int, reads: Sequence[NDArray[np.int64]]
) -> Sequence[ir.Value]:
    """The rows [B * S, heads] of the table that each layer reads, from those of a token with `width` rows."""
    end = builder.op("Mul", tokens, builder.integer(width), name="end")
    starts = builder.op("Range", builder.integer(0), end, builder.integer(width))
    starts = builder.op("Unsqueeze", starts, builder.integers(1))
    every = builder.op("Add", starts, builder.constant(f"{builder.scope}.rows", np.concatenate(reads)))
    if len(reads) == 1:
        return [every]
    return builder.ops("Split", every, outputs=len(reads), axis=1, num_outputs=len(reads))


def _turn(builder: GraphBuilder, layer: Rotation, table: Table, step: Steps) -> None:
    """RotaryEmbedding shares a table's row between heads, so heads are its batch of single tokens, and values turn by
    nothing.
    """
    builder, dtype, to = builder.within(f"{layer.path}.rotary"), layer.v.dtype, layer.setting("compute_dtype")
    heads, kv_heads = layer.heads()
    count, size = heads + 2 * kv_heads, layer.setting("head_dim")
    packed = builder.op("Reshape", _packed(builder, layer), builder.integers(-1, count, size), name="heads")
    if dtype != to:
        packed = builder.op("Cast", packed, to=to)
    packed = builder.op(
        "RotaryEmbedding", packed, table.cos, table.sin, table.rows, num_heads=1,
        rotary_embedding_dim=layer.setting("rotary_dim"), interleaved=layer.setting("interleaved"),
    )  # fmt: skip
    if dtype != to:
        assert dtype is not None
        packed = builder.op("Cast", packed, name="back", to=int(dtype))
    packed = builder.op("Reshape", packed, rows_of(builder, step, count * size))
    apart = builder.op("Reshape", packed, builder.integers(0, 0, count, size), name="apart")
    sizes = builder.integers(heads, kv_heads, kv_heads)
    q, k, v = builder.ops("Split", apart, sizes, outputs=3, axis=2)
    for old, new in zip(layer.node.outputs, (q, k), strict=True):
        old.replace_all_uses_with(new)
    layer.values.replace_input_with(0, v)
    builder.remove(layer.node)


def _packed(builder: GraphBuilder, layer: Rotation) -> ir.Value:
    """Queries, keys and values one after the other: the projection itself, where nothing norms q and k."""
    q, k = layer.node.inputs[:2]
    split = maker(layer.v, "Split")
    if q is split.outputs[0] and k is split.outputs[1]:
        return source(split.inputs[0], "Reshape")
    return builder.op("Concat", q, k, layer.v, axis=2)


def rows_of(builder: GraphBuilder, step: Steps, *extents: int) -> ir.Value:
    """The shape [B, S, extents]."""
    sizes, name = (step.rows, step.new, builder.integers(*extents)), "_".join(map(str, extents))
    return builder.within(SCOPE).op("Concat", *sizes, name=name, axis=0)
