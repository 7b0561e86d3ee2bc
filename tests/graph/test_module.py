"""Modules that are no decoder: exported with sizes of their own, compared, built, and every way to be refused."""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_vision import Adapter, FlowTransformer, TheirFope, example, sizes
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import BuildConfig, ExportConfig
from fope_export.errors import BundleError, ConfigError, FopeError, ParityError
from fope_export.fope.replace import replace_rotary, rotaries
from fope_export.fope.rotary import FopeRotary
from fope_export.graph.module import export_module
from fope_export.manifest import Extent
from fope_export.parity.module import standard_cases, validate_module
from fope_export.parity.run import validate
from fope_export.report import place, print_parity, write_parity
from fope_export.tensorrt.build import build
from tests.graph.pairs import Masked, Pair, pair_inputs, tokens
from tests.support import same_function


@pytest.fixture(scope="module")
def flow() -> FlowTransformer:
    """Images of 4 * rows by 4 * columns; two blocks, four heads of 32, FopeRotary in the place of another's code."""
    torch.manual_seed(0)
    model = FlowTransformer(width=128, heads=4, layers=2).eval()
    before = model(**example())
    assert replace_rotary(model, TheirFope, Adapter) == 2
    torch.testing.assert_close(model(**example(3, 7, 9)).shape, torch.Size((3, 3, 28, 36)))
    assert before.abs().max() > 0.1
    return model


@pytest.fixture(scope="module")
def exported(flow: FlowTransformer, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(1)
    return export_module(flow, example(), tmp_path_factory.mktemp("module") / "flow", dynamic_shapes=sizes())


@pytest.fixture
def spoilt(exported: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may change."""
    return Bundle.open(shutil.copytree(exported.path, tmp_path / "flow"))


def test_the_adapter_is_their_code(flow: FlowTransformer) -> None:
    theirs = TheirFope(heads=4, head_dim=32, longest=256)
    q, k = torch.randn(2, 2, 4, 50, 32).unbind()
    for got, wanted in zip(Adapter(theirs)(q, k), theirs(q, k), strict=True):
        torch.testing.assert_close(got, wanted)


def run(bundle: Bundle, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return results


def test_the_graph_has_the_modules_names_and_sizes(exported: Bundle) -> None:
    shapes = {port.name: port.shape for port in (*exported.manifest.inputs, *exported.manifest.outputs)}
    image = ["batch", 3, "4*rows", "4*columns"]
    assert shapes == {"image": image, "time": ["batch"], "output": image}
    record = exported.manifest.module()
    assert record.calls == len(record.rotations) == len(exported.manifest.spectra) == 2
    assert {name: size.example for name, size in record.sizes.items()} == {"batch": 2, "columns": 5, "rows": 6}
    assert 0 <= record.values["time"][0] <= record.values["time"][1] <= 1
    functions = onnx.load(exported.model, load_external_data=False).functions
    assert [function.name for function in functions] == ["FopeRotary"]


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 13, 3), (5, 3, 17)], ids=str)
def test_unseen_sizes_agree(shape: tuple[int, ...], exported: Bundle, flow: FlowTransformer) -> None:
    inputs, exact = example(*shape), copy.deepcopy(flow).double()
    truth = exact(**{name: tensor.double() for name, tensor in inputs.items()}).detach().numpy()
    same_function(run(exported, inputs)[0], flow(**inputs).detach().numpy(), truth)


@pytest.fixture(scope="module")
def result(exported: Bundle, flow: FlowTransformer) -> Any:
    return validate_module(exported, flow)


def test_it_validates_at_sizes_of_every_kind(result: Any, exported: Bundle) -> None:
    assert result.passed and len(result.cases) == 8 and result.place is None
    assert {"batch 5, columns 11, rows 13", "batch 1, columns 5, rows 6"} <= {case.name for case in result.cases}
    assert all(control.verdict and control.verdict.ratio > 20 for control in result.controls)
    times = torch.cat([case.inputs["time"] for case in standard_cases(exported)])
    assert times.min() >= 0 and times.max() <= 1 and times.std() > 0


def test_the_reports_speak_of_modules_too(result: Any, spoilt: Bundle) -> None:
    write_parity(spoilt, result)
    page, record = ((spoilt.path / f"reports/parity.{kind}").read_text() for kind in ("html", "json"))
    assert "FlowTransformer, 2 rotations" in page and "largest symbolic size" in page and ">passed<" in page
    assert msgspec.json.decode(record)["training_length"] is None
    written = StringIO()
    print_parity(result, Console(width=200, file=written))
    assert "batch 2, columns 19, rows 6" in written.getvalue() and "tokens" not in written.getvalue()


def spoil(bundle: Bundle, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(bundle.model)
    (bundle.path / "model.onnx.data").unlink()
    change(model)
    onnx.save(model, bundle.model, save_as_external_data=True, location="model.onnx.data")


def other_pad(model: onnx.ModelProto) -> None:
    call = next(n for n in model.graph.node if n.name == "blocks.1.fope.rotary/FopeRotary")
    next(a for a in call.attribute if a.name == "sin_pad").f = 0.0


def other_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "blocks.1.mlp.0.weight.T")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))


@pytest.mark.parametrize(
    ("change", "module", "named"),
    [
        (other_pad, "blocks.1.fope.rotary", "Rotations with other settings: blocks.1.fope.rotary"),
        (other_weight, "blocks.1.mlp.0", "Tensors that differ from the checkpoint: blocks.1.mlp.0.weight"),
    ],
)
def test_a_tampered_bundle_fails_and_says_where(
    change: Callable[[onnx.ModelProto], None], module: str, named: str, spoilt: Bundle, flow: FlowTransformer
) -> None:
    spoil(spoilt, change)
    outcome = validate_module(spoilt.path, flow, [example(1, 5, 5)])
    assert not outcome.passed and outcome.damaged and not outcome.cases[0].verdict.passed
    assert outcome.place and outcome.place.divergence and outcome.place.divergence.module == module
    assert named in place(outcome)


def test_garbage_is_no_comparison(spoilt: Bundle, flow: FlowTransformer) -> None:
    spoilt.model.write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"model\.onnx: not a valid ONNX file"):
        validate_module(spoilt, flow, [example()])


def test_a_manifest_that_contradicts_the_module_fails(spoilt: Bundle, flow: FlowTransformer) -> None:
    path = spoilt.path / "fope_export.json"
    path.write_text(path.read_text().replace('"sin_pad": 1.0', '"sin_pad": 0.5', 1))
    outcome = validate_module(spoilt.path, flow, [example()])
    assert not outcome.passed and outcome.damaged == {path.name: "contradicts the module in its rotations"}


def test_controls_leave_the_module_as_it_was(flow: FlowTransformer, result: Any) -> None:
    assert {type(rotary) for rotary in rotaries(flow).values()} == {FopeRotary}
    assert all(rotary.config.sin_pad == 1.0 for rotary in rotaries(flow).values())


def test_it_builds_with_the_plugin(spoilt: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(spoilt.path), "--target", "tensorrt-rtx:sm89", "--size", "rows=2,4,8", "--size"]
    assert main([*command, "columns=2,3,8"]) == 0
    assert "2 plugin layers, batch 1 to 8, columns 2 to 8, rows 2 to 8, for sm89" in capsys.readouterr().out
    assert main(["inspect", str(spoilt.path)]) == 0
    told = capsys.readouterr().out
    assert "FlowTransformer (module)" in told and "4*rows" in told and "2 plugin layers" in told
    assert "cache" not in told


def test_a_rotation_that_no_plugin_takes_is_counted(spoilt: Bundle) -> None:
    def change(model: onnx.ModelProto) -> None:
        call = next(n for n in model.graph.node if n.domain == "fope")
        next(a for a in call.attribute if a.name == "plugin_version").s = b"7"

    spoil(spoilt, change)
    with pytest.raises(FopeError, match="1 of 2 FopeRotary nodes"):
        build(Bundle.open(spoilt.path, verify=False), BuildConfig(target="tensorrt-rtx:sm89"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "height=1,2,3"], "the graph has no size height"),
        (["--size", "rows=1,2,3"], "rows was traced from 2 to any size"),
        (["--size", "rows=3,2,1"], "expected min, opt and max"),
        (["--size", "rows=3"], "sizes"),
        (["--max-length", "64"], "neither max_batch nor max_length"),
    ],
)
def test_sizes_that_cannot_be(
    options: list[str], message: str, exported: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(exported.path), *options]) == 2
    assert message in capsys.readouterr().err


def test_decoders_have_no_such_sizes(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="a decoder has no size rows"):
        build(bundle, BuildConfig(sizes={"rows": (1, 2, 3)}))


def test_what_needs_a_decoder_refuses_a_module(exported: Bundle, flow: FlowTransformer, bundle: Bundle) -> None:
    asks: list[Callable[[], object]] = [partial(load_backend, exported, name) for name in ("onnxruntime", "torch")]
    asks.append(partial(validate, exported))
    for ask in asks:
        with pytest.raises(BundleError, match=r"holds a module, export_vision\.FlowTransformer") as caught:
            ask()
        assert "validate_module" in caught.value.hint
    assert main(["run", str(exported.path), "--prompt", "a"]) == 2
    with pytest.raises(BundleError, match="holds the decoder"):
        validate_module(bundle, flow)


def test_another_module_is_not_what_was_exported(exported: Bundle, flow: FlowTransformer) -> None:
    other = FlowTransformer(width=128, heads=4, layers=2).eval()
    replace_rotary(other, TheirFope, Adapter)
    with pytest.raises(BundleError, match="its state_dict differs"):
        validate_module(exported, other)
    with pytest.raises(ParityError, match=r"input 0: time is torch.float64"):
        validate_module(exported, flow, [{"image": torch.randn(1, 3, 8, 8), "time": torch.rand(1).double()}])


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")], ids=str)
def test_dictionaries_masks_dtypes_and_shared_rotations(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pair().eval().to(dtype)
    with torch.no_grad():
        model.rotary.sin_coef.add_(0.1 * torch.rand_like(model.rotary.sin_coef))
    bundle = export_module(
        model, pair_inputs(), tmp_path / "pair", dynamic_shapes=tokens(), input_names=("tokens", "mask", "positions"),
        config=ExportConfig(opset=24),
    )  # fmt: skip
    assert [port.name for port in bundle.manifest.inputs] == ["tokens", "mask", "positions"]
    assert [port.name for port in bundle.manifest.outputs] == ["attention", "mean"]
    record = bundle.manifest.module()
    assert record.calls == 2 and len(record.rotations) == 1 and record.sizes["length"] == Extent(1, 5, 15)
    assert bundle.manifest.export.dtype == name and bundle.manifest.export.opset == 24
    outcome = validate_module(bundle, model)
    assert {"batch 5, length 11: mean", "batch 2, length 15: attention"} <= {case.name for case in outcome.cases}
    assert outcome.passed, (place(outcome), outcome)
    wide = torch.finfo(torch.float32 if name == "bf16" else dtype)  # what ONNX Runtime computes it in
    assert outcome.dtype == wide.dtype and all(case.own.relative < 10 * wide.eps for case in outcome.cases)
    assert model.rotary.normalize


@pytest.mark.parametrize("floats", [False, True], ids=["bool", "float"])
def test_a_mask_of_padding_for_all_queries(floats: bool, tmp_path: Path) -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    given = torch.zeros(2, 8).masked_fill(~mask, -1e4) if floats else mask
    example = torch.randn(2, 8, 32), given, torch.arange(8).expand(2, -1)
    axes = {0: Dim("batch"), 1: Dim("length", max=64)}
    model = Masked().eval()
    bundle = export_module(model, example, tmp_path / "out", dynamic_shapes=(axes, axes, axes))
    outcome = validate_module(bundle, model, [example])
    assert outcome.passed, outcome.failures


def test_a_subclass_brings_its_own_layout_and_the_controls_see_through_it(tmp_path: Path) -> None:
    class Implicit(FopeRotary):
        """Positions from zero, and q, k [B, H, S, E]."""

        def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            positions = torch.arange(q.shape[2]).expand(q.shape[0], -1)
            q, k = super().forward(q.transpose(1, 2), k.transpose(1, 2), positions)
            return q.transpose(1, 2), k.transpose(1, 2)

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = Implicit.create(head_dim=16, groups=4, training_length=64)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.rotary(x, x)
            scores: Tensor = q @ k.mT
            return scores

    torch.manual_seed(0)
    model = Scores().eval()
    shapes = {"x": {0: Dim("batch"), 2: Dim("length")}}
    bundle = export_module(model, (torch.randn(2, 4, 9, 16),), tmp_path / "out", dynamic_shapes=shapes)
    outcome = validate_module(bundle, model)
    assert outcome.passed and all(control.verdict for control in outcome.controls), outcome
    again = export_module(model, (torch.randn(2, 4, 9, 16),), tmp_path / "again", dynamic_shapes=shapes)
    assert again.manifest.files == bundle.manifest.files
