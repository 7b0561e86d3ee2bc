"""Validation as a whole: good bundles pass, spoiled ones fail and are told where, and every control is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
import pytest
from rich.console import Console

from fope_export.backends.base import Feeds, Logits
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle, sha256
from fope_export.config import CacheName, ExportConfig
from fope_export.errors import BundleError
from fope_export.fope import folding
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.checkpoint import source_of
from fope_export.model.decoder import Cache
from fope_export.parity import run
from fope_export.parity.cases import (
    FAR,
    prefill,
    standard_cases,
)
from fope_export.parity.controls import CONTROLS, Control
from fope_export.parity.judge import ENOUGH
from fope_export.parity.results import ParityResult
from fope_export.parity.run import validate
from fope_export.parity.yardstick import Yardstick
from fope_export.report import parity_page, parity_record, place, print_parity, write_parity
from fope_export.shipped import shipped
from tests.conftest import small_decoder, write_native
from tests.spoiling import attributes, weights


@pytest.fixture(scope="module")
def result(bundle: Bundle) -> ParityResult:
    return validate(bundle)


def test_a_good_bundle_passes_every_case(result: ParityResult) -> None:
    assert result.passed and not result.damaged and not result.broken and result.place is None
    assert {column.name for column in result.columns} == {"all cases"}
    assert result.dtype == "float32" and result.allowance == 1


def test_the_cases_reach_as_far_as_they_should(result: ParityResult) -> None:
    cases = {case.name: case for case in result.cases}
    assert {f"prefill {64 * factor}" for factor in (1, 2, 4, 8, 16)} <= set(cases)
    for last in FAR:
        assert cases[f"decode to {last:,}"].positions == (last - 63, last)
    assert cases["decode across 64"].steps == 33 and cases["decode across 64"].positions == (0, 79)
    assert cases["padded batch"].compared == 41 + 17 + 11
    assert cases["prefill 1"].compared == 64 and cases["prefill 7"].compared == 37 * 7
    assert all(case.compared >= ENOUGH for case in result.cases)


def test_every_control_is_refused_by_far(result: ParityResult) -> None:
    assert len(result.controls) == 4
    for control in result.controls:
        assert control.verdict is not None and not control.skipped
        assert control.passed and control.verdict.ratio > 50


def test_controls_that_a_model_cannot_show_say_why(rope_bundle: Bundle) -> None:
    outcome = validate(rope_bundle, lengths=(64,))
    skipped = {control.name: control.skipped for control in outcome.controls if control.verdict is None}
    assert skipped == {
        "sine of the padding changed": "no pair is padded",
        "coefficients of two heads swapped": "heads have the same coefficients",
    }
    assert outcome.passed


def test_controls_leave_the_model_as_it_was(bundle: Bundle) -> None:
    source = source_of(bundle)
    before = [attention.rotary for attention in source.model.attentions()]
    for control in CONTROLS:
        with control.applied(source.model) as wrong:
            assert wrong.vocab_size == 256
    assert [attention.rotary for attention in source.model.attentions()] == before


def test_a_mistake_that_rounding_hides_is_not_asked_for() -> None:
    """Where all scores are nearly 0, attention is a mean, and positions are lost in the rounding of half precision."""
    model = small_decoder().half()
    for attention in model.attentions():
        attention.att_proj.weight[: 2 * attention.heads * attention.head_dim] *= 1e-2
    yardstick = Yardstick(EagerBackend(model), EagerBackend.in_float64(model))
    case = prefill(model.config, 64, 0)
    shifted = next(control for control in CONTROLS if "shifted" in control.name)
    (outcome,) = run._refusals([shifted], case, yardstick, yardstick.look(case))
    assert outcome.passed and "without rounding it changes the logits by" in outcome.skipped


def test_a_control_that_passes_breaks_the_check(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CONTROLS", (Control("no mistake at all", lambda spectrum: ""),))
    outcome = validate(bundle, lengths=(64,))
    assert not outcome.controls[0].passed and not outcome.passed


def body(bundle: Bundle) -> None:
    """The cosine's pad where the sine's belongs, inside the function."""
    model = onnx.load(bundle.model, load_external_data=False)
    node = next(n for n in model.functions[0].node if "sin_pad_row" in n.output)
    node.input[2] = "zero_float"
    onnx.save(model, bundle.model)


@pytest.mark.parametrize(("dtype", "cache"), [("fp16", "static"), ("bf16", "dynamic")])
def test_half_precision_hides_no_wrong_padding(dtype: str, cache: CacheName, native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", ExportConfig(dtype=dtype, cache=cache))
    attributes("sin_pad", 0.0, 1)(made)
    outcome = validate(made, lengths=(64,))
    assert not outcome.passed and outcome.place and outcome.place.divergence
    assert outcome.place.divergence.module == "layers.1.attention.rotary"
    assert sorted(outcome.damaged) == ["model.onnx"]
    wide = dtype == "bf16"  # ONNX Runtime computes it in float32, and so does what it is held against
    failed = [case.name for case in outcome.cases if not case.verdict.passed]
    assert ("prefill 64" in failed) != wide and ("prefill 64, model.onnx itself" in failed) == wide
    assert outcome.dtype == ("float32" if wide else "float16")
    assert outcome.controls[-1].skipped == ("" if wide else "the model itself is in half precision")


def folded(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Bundle], None]:
    """Another scale on the channels of q and k that are not rotated: 6 of 16 are."""

    def channels(weight: np.ndarray) -> np.ndarray:
        heads = weight[:, : 2 * 4 * 16].reshape(len(weight), -1, 16)
        heads[..., 6:] = change(heads[..., 6:])
        return weight

    return weights("layers.1.attention.att_proj.weight.T", lambda weight: channels(weight.copy()))


@pytest.mark.parametrize(("dtype", "cache"), [("fp32", "dynamic"), ("fp16", "static")])
def test_folded_padding_has_a_parity_of_its_own(dtype: str, cache: CacheName, native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", ExportConfig(dtype=dtype, cache=cache, fold_padding=True))
    assert made.manifest.decoder().spectrum.rotary_dim == 6
    outcome = validate(made, lengths=(7, 64))
    assert outcome.passed and outcome.cases[0].name == "folded against unfolded"
    assert outcome.controls[-1].name == "scale of folded padding forgotten" and outcome.controls[-1].verdict
    folded(lambda channels: channels / np.sqrt(channels.dtype.type(2)))(made)
    outcome = validate(made, lengths=(7, 64))
    assert outcome.cases[0].verdict.passed and not outcome.cases[1].verdict.passed
    assert outcome.place and outcome.place.divergence
    assert outcome.place.divergence.module == "layers.1.attention.att_proj"


def test_a_wrong_fold_is_noticed(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "scale_of", lambda config: 1.0)
    outcome = validate(export(native, tmp_path / "out", ExportConfig(fold_padding=True)), lengths=(7, 64))
    assert [case.verdict.passed for case in outcome.cases[:2]] == [False, True] and not outcome.passed


def one_value(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[3, 3] += 1e-7
    return changed


SPOILED: dict[str, tuple[Callable[[Bundle], None], str, str]] = {
    "padding of layer 1": (attributes("sin_pad", 0.0, 1), "layers.1.attention.rotary", ""),
    "padding, slightly": (attributes("cos_pad", 1.001, 0), "layers.0.attention.rotary", ""),
    "sign": (attributes("sign", -1.0, 1), "layers.1.attention.rotary", ""),
    "function body": (body, "layers.0.attention.rotary", ""),
    "coefficients": (
        weights("layers.1.attention.rotary.cos_coef", lambda a: a[::-1].copy()), "layers.1.attention.rotary",
        "layers.1.attention.rotary.cos_coef",
    ),
    "projection": (
        weights("layers.1.attention.att_proj.weight.T", lambda a: a * 1.01), "layers.1.attention.att_proj",
        "layers.1.attention.att_proj.weight",
    ),
    "feed-forward": (
        weights("layers.0.feed_forward.ff_out.weight.T", lambda a: -a), "layers.0.feed_forward.ff_out",
        "layers.0.feed_forward.ff_out.weight",
    ),
    "norm": (weights("norm.weight", lambda a: a + 0.1), "norm", "norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("rehashed", [False, True], ids=["found by hash", "with a forged manifest"])
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_bundle_fails_and_the_layer_is_named(name: str, rehashed: bool, spoilable: Bundle) -> None:
    spoil, module, tensor = SPOILED[name]
    spoil(spoilable)
    if rehashed:
        files = {n: sha256(spoilable.path / n) for n in spoilable.manifest.files}
        manifest = spoilable.path / "fope_export.json"
        text = manifest.read_text()
        for n, digest in spoilable.manifest.files.items():
            text = text.replace(digest, files[n])
        manifest.write_text(text)
    outcome = validate(spoilable.path, lengths=(7, 64))
    assert not outcome.passed and bool(outcome.damaged) != rehashed
    assert any(not case.verdict.passed for case in outcome.cases)
    assert outcome.place is not None and outcome.place.divergence is not None
    assert outcome.place.divergence.module == module
    assert outcome.place.divergence.error > outcome.place.divergence.allowed
    assert outcome.place.tensors == ((tensor,) if tensor else ())
    settings = name in ("padding of layer 1", "padding, slightly", "sign")
    assert outcome.place.rotations == ((module,) if settings else ())


def test_a_change_below_the_noise_is_found_by_hash_and_named(spoilable: Bundle) -> None:
    weights("layers.1.feed_forward.ff_proj.weight.T", one_value)(spoilable)
    outcome = validate(spoilable.path, lengths=(64,))
    assert not outcome.passed and outcome.damaged
    assert outcome.place is not None and outcome.place.tensors == ("layers.1.feed_forward.ff_proj.weight",)


def heads(bundle: Bundle) -> None:
    """A rotation that loads and does not run."""
    model = onnx.load(bundle.model, load_external_data=False)
    node = next(n for n in model.graph.node if n.name == "layers.1.attention.rotary/FopeRotary")
    next(a for a in node.attribute if a.name == "heads_per_group").i = 2
    onnx.save(model, bundle.model)


def truncated(bundle: Bundle) -> None:
    data = bundle.path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def garbage(bundle: Bundle) -> None:
    bundle.model.write_bytes(b"no graph")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(truncated, r"model\.onnx: tensor .* needs .* bytes"), (garbage, r"model\.onnx: not a valid ONNX file")],
    ids=["truncated", "garbage"],
)
def test_a_graph_that_cannot_be_read_is_no_comparison(
    spoil: Callable[[Bundle], None], named: str, spoilable: Bundle
) -> None:
    spoil(spoilable)
    with pytest.raises(BundleError, match=named):
        validate(spoilable.path, lengths=(7,))


def test_a_graph_that_does_not_run_fails_too(spoilable: Bundle) -> None:
    heads(spoilable)
    outcome = validate(spoilable.path, lengths=(7,))
    assert not outcome.passed and outcome.broken and "layers.1.attention.rotary" in place(outcome)
    write_parity(spoilable, outcome)


def test_a_mask_that_the_graph_ignores_is_found(spoilable: Bundle) -> None:
    model = onnx.load(spoilable.model, load_external_data=False)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(7), "seven"))
    next(n for n in model.graph.node if n.op_type == "Equal").input[1] = "seven"  # no value is padding
    onnx.save(model, spoilable.model)
    outcome = validate(spoilable.path, lengths=(64,))
    assert [case.name for case in outcome.cases if not case.verdict.passed] == ["padded batch"]
    assert outcome.place is not None and outcome.place.divergence is not None
    assert outcome.place.divergence.module == "layers.0.attention.attn_out"


def test_a_manifest_that_contradicts_the_checkpoint_fails(spoilable: Bundle) -> None:
    path = spoilable.path / "fope_export.json"
    path.write_text(path.read_text().replace('"sin_pad": 1.0', '"sin_pad": 0.0'))
    outcome = validate(spoilable.path, lengths=(64,))
    assert not outcome.passed and outcome.damaged == {"fope_export.json": "contradicts the checkpoint in spectrum"}


def test_controls_show_whatever_the_pads_and_the_length(tmp_path: Path) -> None:
    model = small_decoder(length=16)
    for attention in model.attentions():
        s = attention.rotary.spectrum
        config = msgspec.structs.replace(s.config, sin_pad=0.5)
        attention.rotary = FopeRotary.from_spectrum(Spectrum(config, s.freq, s.sin_coef, s.cos_coef))
    model.config = msgspec.structs.replace(model.config, spectrum=config)
    bundle = export(write_native(model, tmp_path / "checkpoint"), tmp_path / "out")
    outcome = validate(bundle, lengths=(1,))
    assert outcome.passed and all(control.verdict for control in outcome.controls)


def test_another_checkpoint_is_refused(native: Path, bundle: Bundle, tmp_path: Path) -> None:
    other = shutil.copytree(native, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json differ"):
        validate(bundle, checkpoint=other)
    with pytest.raises(BundleError, match="is not at"):
        validate(bundle, checkpoint=tmp_path / "nowhere")


class Restarting(EagerBackend):
    """Counts positions from zero in every step: right for whole sequences, wrong with a past."""

    def step(self, feeds: Feeds, cache: Cache, *, last: bool = False) -> tuple[Logits, Cache]:
        counted = np.broadcast_to(np.arange(feeds.input_ids.shape[1]), feeds.input_ids.shape).copy()
        return super().step(feeds._replace(position_ids=counted), cache, last=last)


def test_the_truth_is_taken_without_a_past_so_that_a_broken_cache_shows(bundle: Bundle) -> None:
    model = source_of(bundle).model
    yardstick, broken = Yardstick(EagerBackend(model), EagerBackend.in_float64(model)), Restarting(model)
    cases = standard_cases(model.config, lengths=(64,))
    passed = {case.name for case in cases if yardstick.look(case).judge(case.run(broken)).passed}
    assert passed == {"prefill 64"}


def test_what_another_command_writes_meanwhile_is_no_damage(spoilable: Bundle) -> None:
    def beside(what: str, done: int, total: int) -> None:
        if not done:
            optimize(Bundle.open(spoilable.path))

    assert validate(spoilable, lengths=(7,), report=beside).passed
    assert Bundle.open(spoilable.path).manifest.files != spoilable.manifest.files
    (spoilable.path / "genai_config.json").write_text("{}")
    assert list(validate(spoilable, lengths=(7,)).damaged) == ["genai_config.json"]


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["pi", "yarn"])
def test_what_extending_did_is_in_the_reports(
    kind: Literal["pi", "yarn"], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = export(shipped("fope"), tmp_path / "out", ExportConfig(extend=kind, extend_to=1024))
    outcome = validate(made, lengths=(64,))
    assert outcome.passed and outcome.reach
    assert list(outcome.reach.before) == list(outcome.reach.after) == [256, 512, 1024]
    plain = validate(export(shipped("fope"), tmp_path / "plain"), lengths=(64,))
    assert plain.reach is None
    assert outcome.reach.after[256] > outcome.reach.before[256] + 0.01  # other frequencies, at what it was trained for
    assert outcome.reach.before[256] < 1.1  # the model as it was trained
    print_parity(outcome, Console(width=200))
    assert "before and after extending" in capsys.readouterr().out
    assert "What extending did" in parity_page(made, outcome) and parity_record(made, outcome)["extension"]
