"""Rotations as OpenVINO computes them fastest: sines and cosines come out of a product as the heads read them, and
nothing is gathered.

Letters as in `series`.
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes import PassResult

from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.series import (
    WAVES,
    Rotation,
    computed_in,
    ensure_no_call,
    mixed,
    rotations,
    rows_of,
    waves,
    without_function,
)
from fope_export.graph.steps import Steps, decoder_inputs, steps


class TurnApart(Pass):
    """Rotations become RotaryEmbedding, queries and keys each by themselves, on rows that their layer computes."""

    def requires(self, model: ir.Model) -> None:
        decoder_inputs(model)
        rotations(model)

    def call(self, model: ir.Model) -> PassResult:
        builder, step = GraphBuilder(model), steps(model)
        spectra, series = dict[object, int](), dict[object, int]()
        for layer in rotations(model):
            scope = f"series.{spectra.setdefault(layer.spectrum, len(spectra))}"
            basis = list(waves(builder.within(scope), layer))
            key = scope, *(weight.tobytes() for weight in layer.weights())
            _turn(builder, layer, step, basis, f"{scope}.{series.setdefault(key, len(series))}")
        return without_function(model)

    def ensures(self, model: ir.Model) -> None:
        ensure_no_call(model)


def _turn(builder: GraphBuilder, layer: Rotation, step: Steps, basis: Sequence[ir.Value], series: str) -> None:
    """RotaryEmbedding turns all heads of a token by one row. Where a layer has one, that is it; else each head is a
    token to it.
    """
    dtype, to, size = layer.v.dtype, layer.setting("compute_dtype"), layer.setting("head_dim")
    own, groups = builder.within(f"{layer.path}.rotary"), len(layer.numbers()[1])
    assert dtype is not None
    for name, part, old in zip(("query", "key"), layer.node.inputs, layer.node.outputs, strict=False):
        times = layer.setting("heads_per_group" if name == "query" else "kv_heads_per_group")
        rows, together = (1, times) if groups == 1 else (groups * times, 1)
        sin, cos = _rows(builder.within(series), layer, basis, rows)
        heads = own.op("Reshape", part, own.integers(-1, rows, together * size), name=name)
        if dtype != to:
            heads = own.op("Cast", heads, name=name, to=to)
        heads = own.op(
            "RotaryEmbedding", heads, cos, sin, name=name, num_heads=together,
            rotary_embedding_dim=layer.setting("rotary_dim"), interleaved=layer.setting("interleaved"),
        )  # fmt: skip
        if dtype != to:
            heads = own.op("Cast", heads, name=f"{name}.back", to=int(dtype))
        shape = rows_of(own, step, groups * times, size)
        old.replace_all_uses_with(own.op("Reshape", heads, shape, name=f"{name}.back"))
    builder.remove(layer.node)


def _rows(builder: GraphBuilder, layer: Rotation, basis: Sequence[ir.Value], count: int) -> Iterator[ir.Value]:
    """sign * S and C [N, count, R / 2]: each group's as often as it has heads."""
    for wave, values, weight in zip(WAVES, basis, layer.weights(), strict=True):
        groups, half, name = len(layer.numbers()[1]), layer.setting("rotary_dim") // 2, f"{wave}.{count}"
        weight = weight.reshape(-1, groups, half).repeat(count // groups, axis=1)
        table = mixed(builder, name, values, weight.reshape(len(weight), -1))
        table = builder.op("Reshape", table, builder.integers(-1, count, half), name=name)
        yield computed_in(builder, table, layer.setting("compute_dtype"), name)
