"""Layers that are repeated are those that a trace of all of them has, to the byte."""

from typing import Any

import onnx_ir as ir
import pytest
import torch

from fope_export.config import ExportConfig
from fope_export.fope.rotary import FopeRotary
from fope_export.graph import export as exporting
from fope_export.graph.export import to_onnx
from fope_export.graph.repetition import repeats
from fope_export.model.decoder import Decoder
from tests.conftest import mixture, small_decoder

ALL = mixture(layers=(0, 1, 2, 3, 4))
MODELS: dict[str, tuple[dict[str, Any], ExportConfig]] = {
    "norms, biases, half precision": (
        {"kv_heads": 2, "qk_norm": True, "qkv_bias": True, "out_bias": True}, ExportConfig(dtype="fp16"),
    ),
    "tied, static cache": ({"tie_embeddings": True}, ExportConfig(cache="static", capacity=96)),
    "rope, folded away": ({"kind": "rope"}, ExportConfig(dtype="bf16")),
    "experts of integers": ({"experts": ALL}, ExportConfig(quantize="int4", rounding="nearest")),
}  # fmt: skip


def five(**fields: Any) -> Decoder:
    return small_decoder(num_layers=5, **fields)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_graph_of_all_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, config = MODELS[name]
    config = config.resolved(64)
    model = five(**fields).converted(config)
    assert repeats(model)
    got = to_onnx(model, config)
    monkeypatch.setattr(exporting, "repeats", lambda model: False)
    wanted = to_onnx(model, config)
    for ours, theirs in zip(got.graph, wanted.graph, strict=True):
        assert str(ours) == str(theirs)
    assert ir.to_proto(got).SerializeToString() == ir.to_proto(wanted).SerializeToString()


def fourth_of_another_spectrum(model: Decoder) -> None:
    model.attentions()[3].rotary = FopeRotary.from_spectrum(small_decoder("rope").attentions()[0].rotary.spectrum)


def two_that_share(model: Decoder) -> None:
    model.attentions()[4].att_proj.weight = model.attentions()[3].att_proj.weight


@pytest.mark.parametrize("change", [fourth_of_another_spectrum, two_that_share])
def test_layers_that_differ_are_all_traced(change: Any) -> None:
    model = five()
    change(model)
    assert not repeats(model)


def test_few_layers_and_other_mixtures_are_all_traced() -> None:
    assert not repeats(small_decoder(num_layers=3)) and not repeats(five(experts=mixture(layers=(1,))))


def test_every_layer_has_its_own_numbers() -> None:
    model = five()
    tensors = to_onnx(model, ExportConfig()).graph.initializers
    state = model.state_dict()
    for i in range(5):
        value = tensors[f"layers.{i}.attention.att_proj.weight.T"].const_value
        assert value is not None
        assert torch.equal(torch.from_numpy(value.numpy()), state[f"layers.{i}.attention.att_proj.weight"].T)
