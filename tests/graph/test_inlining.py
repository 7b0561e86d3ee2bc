"""A bundle without functions: the same numbers, the same weights, and every command that takes it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle, sha256
from fope_export.config import BuildConfig, ExportConfig
from fope_export.errors import ConfigError, ExportError
from fope_export.fope import contract
from fope_export.fope.rotary import FopeRotary
from fope_export.graph.export import export
from fope_export.graph.inlining import CallRotary, called
from fope_export.graph.module import export_module
from fope_export.graph.optimize import optimize
from fope_export.graph.reading import load_onnx
from fope_export.manifest import MANIFEST
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.parity.module import validate_module
from fope_export.parity.run import validate
from fope_export.parity.stages import validate_stages
from fope_export.tensorrt.build import build
from tests.conftest import mixture, small_decoder, write_native
from tests.extensions import extended_decoder
from tests.graph.pairs import Pair, pair_inputs
from tests.graph.pairs import tokens as tokens_of
from tests.support import close, same_function, tokens, truth_of

WAYS: dict[str, tuple[Callable[[], Decoder], dict[str, Any]]] = {
    "grouped": (lambda: small_decoder(kv_heads=2), {}),
    "one head": (lambda: small_decoder(heads=1, kv_heads=1), {"opset": 24}),
    "general": (lambda: extended_decoder(axes=3, bases=2), {}),
    "axes": (lambda: extended_decoder(axes=3), {"position_axes": True}),
    "folded": (small_decoder, {"fold_padding": True, "dtype": "fp16"}),
    "bfloat16": (small_decoder, {"dtype": "bf16"}),
    "static": (small_decoder, {"cache": "static", "capacity": 100}),
    "int4": (small_decoder, {"quantize": "int4", "block": 32, "rounding": "nearest"}),
    "experts": (lambda: small_decoder(experts=mixture()), {"quantize": "int8", "block": 32, "rounding": "nearest"}),
    "int8-qdq": (small_decoder, {"quantize": "int8-qdq"}),
    "nvfp4": (small_decoder, {"quantize": "nvfp4"}),
}
Both = tuple[Bundle, Bundle]


@pytest.fixture(scope="module", params=WAYS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The same model with and without a function."""
    make, options = WAYS[request.param]
    folder = tmp_path_factory.mktemp("inlined")
    checkpoint = write_native(make(), folder / "checkpoint")
    plain, written = (
        export(checkpoint, folder / name, ExportConfig(**options, inline=inline))
        for name, inline in (("plain", False), ("inlined", True))
    )
    return plain, written


def described(model: ir.Model) -> onnx.ModelProto:
    """A model whose calls carry their attributes in one order."""
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
    return proto


def named_sizes(model: onnx.ModelProto) -> set[str]:
    return {size.dim_param for value in model.graph.value_info for size in value.type.tensor_type.shape.dim}


def test_it_has_standard_operators_alone_and_every_call_is_found_again(pair: Both) -> None:
    plain, written = pair
    proto = onnx.load(written.model, load_external_data=False)
    assert not proto.functions and contract.DOMAIN not in {opset.domain for opset in proto.opset_import}
    assert named_sizes(proto) <= named_sizes(onnx.load(plain.model, load_external_data=False)) | {""}
    again, wanted = described(called(load_onnx(written.model))), described(load_onnx(plain.model))
    assert again.functions == wanted.functions and again.graph.node == wanted.graph.node
    assert again.graph.initializer == wanted.graph.initializer and again.graph.input == wanted.graph.input
    data = "model.onnx.data"
    assert (written.path / data).read_bytes() == (plain.path / data).read_bytes()


def test_it_computes_what_the_function_does(pair: Both) -> None:
    plain, written = pair
    config, ids = plain.manifest.decoder(), tokens(2, 9)
    feeds = feeds_for(ids)
    if plain.manifest.export.position_axes:
        feeds = feeds._replace(position_ids=np.stack([feeds.position_ids] * config.spectrum.axes, axis=-1))
    got, wanted = (
        backend.step(feeds, backend.empty_cache(2))[0]
        for backend in (load_backend(bundle, variant="portable") for bundle in (written, plain))
    )
    truth = truth_of(load_checkpoint(plain.manifest.source.path).model, ids)
    same_function(got, wanted, truth)


def test_it_is_the_same_twice(written: Bundle, tmp_path: Path) -> None:
    again = export(written.manifest.source.path, tmp_path / "again", written.manifest.export)
    assert again.manifest.files == written.manifest.files


def test_what_a_runtime_gets_for_itself_is_the_same(pair: Both, tmp_path: Path) -> None:
    """The optimized file, but for what it says of the portable one's hash."""
    plain, written = (Bundle.open(shutil.copytree(each.path, tmp_path / each.path.name)) for each in pair)
    if plain.manifest.export.cache == "static":
        with pytest.raises(ConfigError, match="has a static cache"):
            optimize(written)
        return
    files = [load_onnx(optimize(bundle).path / "model.ort.onnx") for bundle in (plain, written)]
    for model in files:
        del model.metadata_props["fope.optimized"]
    assert ir.to_proto(files[0]) == ir.to_proto(files[1])


def test_openvino_gets_the_same(tmp_path: Path, native: Path) -> None:
    pytest.importorskip("openvino", reason="needs fope-export[openvino]")
    made = [
        optimize(export(native, tmp_path / name, ExportConfig(inline=inline)), "openvino").path / "openvino"
        for name, inline in (("plain", False), ("inlined", True))
    ]
    hashes = [Bundle.open(folder.parent).manifest.files["model.onnx"] for folder in made]
    texts = [(folder / "openvino_model.xml").read_text() for folder in made]
    assert texts[0] == texts[1].replace(hashes[1], hashes[0])
    assert len({(folder / "openvino_model.bin").read_bytes() for folder in made}) == 1


@pytest.fixture(scope="module")
def written(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(native, tmp_path_factory.mktemp("written") / "out", ExportConfig(inline=True))


@pytest.fixture
def spoilt(written: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may change."""
    return Bundle.open(shutil.copytree(written.path, tmp_path / "bundle"))


def test_it_validates_and_its_controls_are_refused(spoilt: Bundle) -> None:
    outcome = validate(spoilt, lengths=(7, 64))
    assert outcome.passed and [control.name for control in outcome.controls if not control.skipped]
    assert all(control.passed for control in outcome.controls)
    assert validate_stages(spoilt).passed


def constant(bundle: Bundle, name: str, value: float) -> None:
    """Change what layer 1 was told."""
    model = onnx.load(bundle.model, load_external_data=False)
    node = next(n for n in model.graph.node if n.name == f"layers.1.attention.rotary/FopeRotary/{name}")
    node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array(value, np.float32)))
    onnx.save(model, bundle.model)


def kind(bundle: Bundle, name: str, op_type: str) -> None:
    """Make another operation of a node of layer 1."""
    model = onnx.load(bundle.model, load_external_data=False)
    next(n for n in model.graph.node if n.name == f"layers.1.attention.rotary/FopeRotary/{name}").op_type = op_type
    onnx.save(model, bundle.model)


def refile(bundle: Bundle) -> None:
    """Have its manifest say what its files are now."""
    manifest = bundle.path / MANIFEST
    text = manifest.read_text()
    for name, digest in bundle.manifest.files.items():
        text = text.replace(digest, sha256(bundle.path / name))
    manifest.write_text(text)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: constant(b, "sin_pad_value", 0.5),
        lambda b: constant(b, "sign_value", -1.0),
        lambda b: kind(b, "sines", "Cos"),
    ],
    ids=["padding", "sign", "another function"],
)
def test_a_wrong_rotation_fails_and_is_named(spoil: Callable[[Bundle], None], spoilt: Bundle) -> None:
    spoil(spoilt)
    outcome = validate(spoilt.path, lengths=(7, 64))
    assert not outcome.passed and outcome.place is not None and outcome.place.divergence is not None
    assert outcome.place.rotations == ("layers.1.attention.rotary",)
    assert outcome.place.divergence.module.startswith("layers.1.attention.")


def test_what_is_no_rotation_any_more_is_not_optimized(spoilt: Bundle) -> None:
    kind(spoilt, "sines", "Cos")
    refile(spoilt)
    with pytest.raises(ExportError, match="rotary/FopeRotary/sines is not as in FopeRotary"):
        optimize(spoilt.path)
    assert sum(node.domain == contract.DOMAIN for node in called(load_onnx(spoilt.model)).graph) == 1  # of layer 0


def test_a_plugin_has_nothing_to_take(spoilt: Bundle) -> None:
    with pytest.raises(ConfigError, match="no node of it is a FopeRotary") as refusal:
        build(spoilt, BuildConfig())
    assert "--no-plugin" in refusal.value.hint
    _, record = build(
        spoilt, BuildConfig(target="tensorrt-rtx:sm89", plugin=False, max_batch=1, max_length=64, timing_cache=False)
    )
    assert record.plugin_layers == 0 and record.layers["ROTARY_EMBEDDING"] == 4


def test_a_module_without_functions(tmp_path: Path) -> None:
    """Which uses one rotation twice."""
    module = Pair().eval()
    bundle = export_module(
        module, pair_inputs(), tmp_path / "out", dynamic_shapes=tokens_of(), config=ExportConfig(inline=True)
    )
    proto = onnx.load(bundle.model, load_external_data=False)
    assert not proto.functions and bundle.manifest.module().calls == 2
    assert validate_module(bundle, module).passed


def test_a_rotations_own_outputs_may_be_the_graphs(tmp_path: Path) -> None:
    rotary = FopeRotary.create(head_dim=16, groups=2, training_length=64).eval()
    q, k, places = example = torch.rand(1, 8, 4, 16), torch.rand(1, 8, 2, 16), torch.arange(8)[None]
    bundle = export_module(rotary, example, tmp_path / "out", config=ExportConfig(inline=True))
    session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    feeds = {value.name: given.numpy() for value, given in zip(session.get_inputs(), example, strict=True)}
    for got, wanted in zip(session.run(None, feeds), rotary(q, k, places), strict=True):
        close(got, wanted.detach().numpy())
    assert [node.op_type for node in CallRotary()(load_onnx(bundle.model)).model.graph] == [contract.NAME]
