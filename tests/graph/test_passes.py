"""Each pass alone: it keeps the model's numbers, needs what it says, and is caught where it does not do its work."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError, Sequential
from onnx_ir.passes.common import ShapeInferencePass, TopologicalSortPass

from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.dtypes import BF16, FP32
from fope_export.errors import BundleError
from fope_export.fope import contract
from fope_export.graph import nvfp4
from fope_export.graph.base import Pass
from fope_export.graph.builder import GraphBuilder
from fope_export.graph.caches import RoundCaches
from fope_export.graph.calibration import Ranges
from fope_export.graph.expert_weights import ExactExperts, QuantizeExperts, RoundExpertInputs
from fope_export.graph.experts import FuseExperts
from fope_export.graph.export import to_onnx
from fope_export.graph.fusion import FuseAttention, FuseSkipNorm, KeepLastLogits
from fope_export.graph.inlining import CallRotary, InlineRotary
from fope_export.graph.masks import ExpandMasks
from fope_export.graph.nvfp4 import WidenNumbers
from fope_export.graph.openvino import RepeatHeads, TakeSizesFromTokens
from fope_export.graph.optimize import FUSIONS
from fope_export.graph.parting import PartProducts, StoreByResult
from fope_export.graph.passes import (
    AttachRotary,
    CastBFloat16ToFloat32,
    NameDimensions,
    NameNodes,
    ShareSpectra,
    TransposeWeights,
    rewritten,
)
from fope_export.graph.qdq import ExactInputs, InsertQdq
from fope_export.graph.quantize import EXACT, INT8, QuantizeWeights, SetAccuracyLevel, nearest
from fope_export.graph.series import ShareSeries
from fope_export.graph.turning import TurnApart
from fope_export.quantizations import CACHES
from tests.conftest import mixture, small_decoder
from tests.graph.as_torch import torchs
from tests.support import close, same_function, truth_of

WIDEN = CastBFloat16ToFloat32(BF16, FP32)
PROJECTION = "layers.0.attention.att_proj"
ROUND, QMOE = QuantizeExperts("int4", 32, partial(nearest, 4)), RoundExpertInputs(INT8)
CACHED = RoundCaches(
    next(iter(CACHES.values())),
    {f"past_key_values.{layer}.{part}": np.ones((4, 16), np.float32) for layer in (0, 1) for part in ("key", "value")},
)
RANGES = {PROJECTION: Ranges(1.0, np.ones(192, np.float32))}


@cache
def translated(dtype: str) -> ir.Model:
    return to_onnx(small_decoder().converted(config := ExportConfig(dtype=dtype).resolved(64)), config)


def decoder(dtype: str = "fp32") -> ir.Model:
    """A copy that a test may change."""
    return translated(dtype).clone()


def before(last: type[Pass]) -> ir.Model:
    """The decoder as a pass of FUSIONS finds it."""
    model = decoder()
    for each in FUSIONS:
        if isinstance(each, last):
            break
        each(model)
    return model


def fused() -> ir.Model:
    """With its caches in place."""
    model = before(KeepLastLogits)
    TopologicalSortPass()(model)
    return model


def transposing() -> ir.Model:
    text = (
        '<ir_version: 11, opset_import: ["": 23]> g (float[n, 2] x) => (float[n, 3] y) '
        "<float[3, 2] w = {1, 2, 3, 4, 5, 6}> { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }"
    )
    return ir.from_onnx_text(text)


def spread() -> ir.Model:
    """A mask of one row for all queries."""
    return ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["": 23]> g (float[b, 2, s, 4] q, bool[b, 1, 1, s] mask) '
        "=> (float[b, 2, s, 4] y) { y = Attention(q, q, q, mask) }"
    )


def numbers_at(node: ir.Node, port: int) -> ir.Value:
    value = node.inputs[port]
    assert value is not None
    return value


def unshared() -> ir.Model:
    """Two layers with equal numbers, of which each has its own."""
    model = decoder()
    first, second = (node for node in model.graph if node.domain == contract.DOMAIN)
    for port in (3, 4, 5):
        numbers_at(second, port).const_value = numbers_at(first, port).const_value
    return model


def without_function() -> ir.Model:
    model = decoder()
    model.functions.clear()
    return model


BLOCKS = ExportConfig(quantize="int4", block=32)


def product(model: ir.Model) -> ir.Model:
    QuantizeWeights(BLOCKS)(model)
    return model


def rounded() -> ir.Model:
    model = decoder()
    InsertQdq("int8-qdq", RANGES)(model)
    return model


NVFP4 = ExportConfig(quantize="nvfp4")


def in_e2m1() -> ir.Model:
    return Sequential(*nvfp4.write(NVFP4, None))(decoder()).model


@cache
def mixed() -> ir.Model:
    return to_onnx(small_decoder(experts=mixture()), ExportConfig().resolved(64))


def experts(*edits: Pass) -> Callable[[], ir.Model]:
    """A decoder with a mixture, after some passes."""
    return lambda: Sequential(*edits)(mixed().clone()).model if edits else mixed().clone()


@cache
def of_groups() -> ir.Model:
    return to_onnx(small_decoder(kv_heads=2), ExportConfig().resolved(64))


def grouped() -> ir.Model:
    """Two queries have one head of keys and values."""
    return of_groups().clone()


def no_queries(model: ir.Model) -> None:
    """Nobody knows their shape."""
    for node in model.graph:
        if node.op_type == "Attention":
            numbers_at(node, 0).shape = None


def every_row(model: ir.Model) -> None:
    """Gate and up are no rows in turn."""
    for node in model.graph:
        if node.op_type == "Slice":
            node.replace_input_with(4, numbers_at(node, 3))


def two_blocks(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "DequantizeLinear").attributes["block_size"] = ir.AttrInt64(
        "block_size", 16
    )


def no_integers(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "QMoE").replace_input_with(11, None)


def no_numbers(model: ir.Model) -> None:
    next(iter(model.graph.initializers.values())).const_value = None


def no_dispatch(model: ir.Model) -> None:
    del next(node for node in model.graph if node.domain == contract.DOMAIN).attributes["plugin_namespace"]


def no_spectrum(model: ir.Model) -> None:
    numbers_at(next(node for node in model.graph if node.domain == contract.DOMAIN), 3).const_value = None


def no_scopes(model: ir.Model) -> None:
    for node in model.graph:
        node.metadata_props.clear()


def no_shape(model: ir.Model) -> None:
    model.graph.outputs[0].shape = None


def no_kind(*kinds: str) -> Callable[[ir.Model], None]:
    """No node is of these kinds any more."""

    def change(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type in kinds:
                node.op_type = "Identity"

    return change


def no_position_ids(model: ir.Model) -> None:
    next(value for value in model.graph.inputs if value.name == "position_ids").name = "positions"


def cache_of_its_own(model: ir.Model) -> None:
    model.graph.inputs.pop()


def norm_of_two_axes(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.attributes["axis"] = ir.AttrInt64("axis", -2)


class Row(NamedTuple):
    edit: Pass
    model: Callable[[], ir.Model]
    spoil: Callable[[ir.Model], object]
    needs: str
    promises: str


def computed(model: ir.Model) -> None:
    """Weights that a node makes."""
    node = next(each for each in model.graph if each.name == "layers.0.feed_forward.ff_proj/MatMul")
    node.replace_input_with(1, GraphBuilder(model, before=node).op("Identity", node.inputs[1]))


ROWS = [
    Row(TransposeWeights(), transposing, no_numbers, "w has no numbers", "w is still transposed"),
    Row(AttachRotary(), without_function, no_dispatch, "no plugin would be found", "a function that the model lacks"),
    Row(
        InlineRotary(),
        decoder,
        lambda model: model.functions.clear(),
        "a function that the model lacks",
        "a rotation is still a call",
    ),
    Row(
        CallRotary(),
        lambda: InlineRotary()(decoder()).model,
        no_kind("Sin"),
        "sines is not as in FopeRotary",
        "rotary/FopeRotary is still written out",
    ),
    Row(WIDEN, lambda: decoder(dtype="bf16"), WIDEN, "nothing in bfloat16", "is in bfloat16"),
    Row(ShareSpectra(), unshared, no_spectrum, "numbers that are no initializers", "a copy of another layer's numbers"),
    Row(ExpandMasks(), spread, no_queries, "no queries", "one row of its mask for all queries"),
    Row(NameNodes(), torchs, no_scopes, "torch.onnx did not make", "node_Neg_0 is not called layers.0/Neg"),
    Row(NameDimensions({"s1": "n"}), torchs, no_shape, "y has no shape", "a size that is no name"),
    Row(QuantizeWeights(BLOCKS), decoder, no_kind("MatMul"), "no linear layer", "is not quantized"),
    Row(nvfp4.write(NVFP4, None)[0], decoder, no_kind("MatMul"), "no linear layer", "is not quantized"),
    Row(WidenNumbers(), in_e2m1, no_kind("MatMul"), "no weight is in E2M1", "is in E2M1"),
    Row(SetAccuracyLevel(INT8), lambda: product(decoder()), no_kind("MatMulNBits"), "no weights are", f"level {EXACT}"),
    Row(InsertQdq("int8-qdq", RANGES), decoder, no_kind("MatMul"), f"disagree in .*{PROJECTION}", "disagree in"),
    Row(ExactInputs(), rounded, no_kind("QuantizeLinear", "DequantizeLinear"), "no layer rounds", "rounds its inputs"),
    Row(ShareSeries(), decoder, no_position_ids, "no input position_ids", "a rotation is still a call"),
    Row(ShareSeries(), decoder, no_kind(contract.NAME, "Attention"), "read by 0 Attention", "still a call"),
    Row(
        FuseAttention(), lambda: before(FuseAttention), cache_of_its_own, "does not join an input", "Attention is left"
    ),
    Row(FuseAttention(), lambda: before(FuseAttention), no_kind("Split"), "not made by Split", "Attention is left"),
    Row(ShareSeries(), decoder, ShareSeries(), "the model has no rotation", "a rotation is still a call"),
    Row(TurnApart(), decoder, no_position_ids, "no input position_ids", "a rotation is still a call"),
    Row(FuseAttention(), lambda: before(FuseAttention), FuseAttention(), "the model has no attention", "is left"),
    Row(KeepLastLogits(), decoder, KeepLastLogits(), "the input logits_to_keep already", "the last norm sees all"),
    Row(KeepLastLogits(), decoder, no_kind("MatMul"), "logits is not made by MatMul", "the last norm sees all"),
    Row(FuseExperts(), experts(), every_row, "no rows of gate and up in turn", "all experts of layers.1.feed_forward"),
    Row(FuseExperts(), experts(), no_kind("ScatterElements"), "experts that nothing chose", "compute every token"),
    Row(ROUND, experts(), every_row, "no rows of gate and up in turn", "layers.1.feed_forward are not quantized"),
    Row(QMOE, experts(ROUND, FuseExperts()), two_blocks, "in two sizes of blocks", "reads its inputs as they are"),
    Row(ExactExperts(), experts(ROUND, FuseExperts(), QMOE), no_integers, "that are no numbers", "rounds its inputs"),
    Row(TakeSizesFromTokens(), decoder, no_position_ids, "no input position_ids", "takes a size from the cache"),
    Row(RepeatHeads(), grouped, no_queries, "reads what has no shape", "fewer heads of keys or values"),
    Row(PartProducts(), decoder, computed, "reads weights that are no init", "att_proj/MatMul is split after"),
    Row(StoreByResult(), decoder, no_kind("MatMul"), "no linear layer", "has a column of weights for each result"),
    Row(CACHED, lambda: fused(), no_kind("GroupQueryAttention"), "disagree in past_key", "does not round its cache"),
    Row(FuseSkipNorm(), decoder, norm_of_two_axes, "more than the last axis", "ff_norm/RMSNormalization reads a sum"),
]
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{type(row.edit).__name__}: {row.needs}")


def test_every_pass_has_a_row() -> None:
    package = {each for each in Pass.__subclasses__() if each.__module__.startswith("fope_export.")}
    assert package == {type(row.edit) for row in ROWS}


@EACH
def test_it_says_by_name_what_it_misses(row: Row) -> None:
    model = row.model()
    row.spoil(model)
    with pytest.raises(PreconditionError, match=f"^{type(row.edit).__name__}: .*{row.needs}"):
        row.edit(model)


@EACH
def test_it_does_its_work_and_is_caught_where_it_does_not(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    assert row.edit(row.model()).modified
    monkeypatch.setattr(type(row.edit), "call", lambda self, model: PassResult(model, modified=False))
    with pytest.raises(PostconditionError, match=f"^{type(row.edit).__name__}: .*{row.promises}"):
        row.edit(row.model())


def test_half_a_work_is_caught() -> None:
    fused = before(KeepLastLogits)
    fused.graph.outputs.pop()
    with pytest.raises(PostconditionError, match="GroupQueryAttention does not write into its cache"):
        FuseAttention().ensures(fused)
    twice = torchs()
    (node,) = twice.graph
    node.name = "layers.0/Neg"
    twice.graph.append(ir.node("Neg", node.inputs, name=node.name, metadata_props=dict(node.metadata_props)))
    with pytest.raises(PostconditionError, match=r"layers\.0/Neg is the name of two nodes"):
        NameNodes().ensures(twice)


def run(model: ir.Model, ids: np.ndarray) -> np.ndarray:
    """Logits of the fifth token and the last, from a step of five and one of the others on what it left."""
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    past = {value.name: value.shape[1] for value in session.get_inputs() if value.name.startswith("past")}
    cache, logits = [np.zeros((1, heads, 0, 16), np.float32) for heads in past.values()], []
    for new in (slice(0, 5), slice(5, None)):
        positions = np.arange(ids.shape[1])[None, new]
        mask = np.ones((1, positions[0, -1] + 1), np.int64)
        feeds = {"input_ids": ids[:, new], "attention_mask": mask, "position_ids": positions}
        step, *cache = session.run(None, feeds | dict(zip(past, cache, strict=True)))
        logits.append(step[0, -1])
    return np.array(logits)


ALONE = (*FUSIONS[:1], *FUSIONS[2:], PartProducts(), StoreByResult(), TurnApart())


@pytest.mark.parametrize("chosen", [*((edit,) for edit in ALONE), FUSIONS[:2], FUSIONS])
def test_it_changes_no_number(chosen: tuple[Pass, ...]) -> None:
    """Each alone, but FuseAttention, which needs ShareSeries before it."""
    ids = np.arange(8)[None]
    got = run(Sequential(*chosen, TopologicalSortPass(), ShapeInferencePass())(decoder()).model, ids)
    same_function(got, run(decoder(), ids), truth_of(small_decoder(), ids)[0, [4, 7]])


@cache
def biased() -> ir.Model:
    """Queries, keys and values have a bias, and queries twice the heads."""
    model = small_decoder(kv_heads=2, qkv_bias=True)
    for attention in model.attentions():
        torch.nn.init.normal_(attention.att_proj.bias)
    return to_onnx(model, ExportConfig().resolved(64))


@pytest.mark.parametrize(("quantized", "kind"), [(lambda model: model, "MatMul"), (product, "MatMulNBits")])
def test_products_are_parted_whatever_their_parts_and_biases(
    quantized: Callable[[ir.Model], ir.Model], kind: str
) -> None:
    ids, parted = np.arange(8)[None], PartProducts()(quantized(biased().clone())).model
    kinds = [node.op_type for node in parted.graph]
    assert "Split" not in kinds and kinds.count(kind) == 2 * 7 + 1
    close(run(parted, ids), run(quantized(biased().clone()), ids))


def test_a_bundle_that_is_not_what_its_manifest_says_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match="not as its manifest says: CastBFloat16ToFloat32: the model has nothing in bfloat16"
    ):
        rewritten(bundle.model, tmp_path / "copy.onnx", [WIDEN])
