"""Rounded keys and values: right in both runtimes whatever rows do, bounded in cost, and refused where wrong."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from fope_export.backends.base import Backend, feeds_for
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import BundleError, ConfigError
from fope_export.graph.caches import calibrated_on, steps_in
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.manifest import CALIBRATED_ON, MANIFEST, OPTIMIZED, ROUNDED_CACHE, judged_files
from fope_export.parity.cached import misfits
from fope_export.parity.run import validate
from fope_export.quantizations import CACHES, EXACT_CACHE
from fope_export.report import parity_page, place, print_parity
from fope_export.serving.host import bytes_of_a_token
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.speculation import Speculation
from tests.conftest import mixture, small_decoder, write_native
from tests.support import answers, truth_of

(ROUNDED,) = CACHES
RUNTIMES = ["onnxruntime", "openvino"]
MODEL = small_decoder(kv_heads=2)
FLIPPED = 0.5
"""Of all that rounding moves: what another order of summation may, by a number that falls on the other step."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Both runtimes' files with rounded caches."""
    folder = tmp_path_factory.mktemp("caches")
    bundle = export(write_native(MODEL, folder / "model"), folder / "out")
    return optimize(optimize(bundle, cache=ROUNDED), "openvino")


@pytest.fixture(scope="module", params=RUNTIMES)
def backend(request: pytest.FixtureRequest, made: Bundle) -> Backend:
    return load_backend(made, request.param)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_runs_is_what_pytorch_gives_on_what_the_cache_holds(runtime: str, made: Bundle) -> None:
    result = validate(made, backend=runtime, lengths=(7,))
    assert result.passed, result.failures
    assert result.tested[-1].variant == "cache rounded" and result.cost is None
    assert "prefill 64, cache rounded" in [case.name for case in result.cases]
    assert [control.name for control in result.controls if "steps of" in control.name and not control.skipped] != []
    (cost,) = result.caches
    assert cost.growth is not None and cost.growth <= cost.limit and cost.kl > 0
    print_parity(result, console := Console(file=io.StringIO(), width=200))
    said = f"{ROUNDED} keys and values in {runtime}: perplexity"
    assert said in console.file.getvalue() and said in parity_page(made, result)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        ({"quantize": "int4", "rounding": "nearest"}, {"experts": mixture()}),
        ({"fold_padding": True, "dtype": "bf16"}, {}),
    ],
    ids=str,
)
def test_it_goes_with_what_else_a_bundle_may_be(fields: dict[str, Any], model: dict[str, Any], tmp_path: Path) -> None:
    written = write_native(small_decoder(**model), tmp_path / "model")
    result = validate(optimize(export(written, tmp_path / "out", ExportConfig(**fields)), cache=ROUNDED), lengths=(7,))
    assert result.passed, result.failures
    assert bool(result.cost) == ("quantize" in fields) and len(result.caches) == 1


Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def other_layer(steps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(steps, [*list(steps.values())[2:], *list(steps.values())[:2]], strict=True))


def heads_swapped(steps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[:, ::-1] for name, array in steps.items()}


def values_for_keys(steps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(steps, [list(steps.values())[i ^ 1] for i in range(len(steps))], strict=True))


def halved(steps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array / 2 for name, array in steps.items()}


def one_channel(steps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    first = next(iter(steps))
    array = steps[first].copy()
    array[0, 1, 0, 5] *= 1.01
    return steps | {first: array}


def spoilt(made: Bundle, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Bundle:
    """With its hash put right: only what it computes can tell."""
    bundle = Bundle.open(shutil.copytree(made.path, folder / "spoilt"))
    model = onnx.load(bundle.path / ROUNDED_CACHE, load_external_data=False)
    edit(model)
    return bundle.add({ROUNDED_CACHE: model.SerializeToString()})


@pytest.mark.parametrize("change", [other_layer, heads_swapped, values_for_keys, halved, one_channel])
def test_steps_that_are_not_the_calibrations_are_found(change: Change, made: Bundle, tmp_path: Path) -> None:
    """By the numbers alone: the file's hash is right."""

    def edit(model: onnx.ModelProto) -> None:
        tensors = {t.name: t for t in model.graph.initializer if t.name.endswith(".steps")}
        assert len(tensors) == 4
        for name, array in change({name: onnx.numpy_helper.to_array(t) for name, t in tensors.items()}).items():
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))

    wrong, row = spoilt(made, tmp_path, edit), CACHES[ROUNDED]
    found = list(misfits(wrong, row, EagerBackend(MODEL)))
    assert len(found) == (1 if change is one_channel else 4) and not wrong.damaged()
    if change is halved:
        result = validate(wrong, backend="onnxruntime", lengths=(7,))
        assert not result.passed and "steps of past_key_values.1.value are not what PyTorch gives" in str(
            result.failures
        )


def scaled(model: onnx.ModelProto) -> None:
    """Scores of the last layer are others."""
    (*_, last) = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    last.attribute.append(onnx.helper.make_attribute("scale", 1.001 / 4))


def read_elsewhere(model: onnx.ModelProto) -> None:
    """The second layer's keys are the first one's."""
    first, second = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    second.input[0] = first.input[0]


@pytest.mark.parametrize("edit", [scaled, read_elsewhere])
def test_a_file_that_computes_something_else_is_refused(
    edit: Callable[[onnx.ModelProto], None], made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fope_export.parity.cached.change", lambda *_: (9, 0.0, None, None))
    result = validate(spoilt(made, tmp_path, edit), backend="onnxruntime", lengths=(7,))
    failed = [case.name for case in result.cases if not case.verdict.passed]
    assert failed == ["prefill 64, cache rounded"] and not result.damaged
    assert bool([name for name in result.caches[0].strays if name.startswith("numbers")]) == (edit is read_elsewhere)

    assert "the fault lies in how keys and values are rounded" in place(result)


def test_a_cache_that_costs_too_much_is_refused(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fope_export.parity.cached.change", lambda *_: (9, 0.1, 2.0, 2.01))
    result = validate(made, backend="onnxruntime", lengths=(7,))
    assert [failure for failure in result.failures if "perplexity grows by 0.50% > 0.1%" in failure]


def test_a_row_is_its_tokens_alone_whatever_happens_beside_it(backend: Backend) -> None:
    """Prefixes are copied, guesses taken back, rows freed and grown: beside whole prompts in a cache of their own."""
    rng, slots = np.random.default_rng(0), backend.slots(3)
    long, short = rng.integers(1, 256, 300), rng.integers(1, 256, 40)
    slots.prefill(0, long[:20], 0)
    slots.prefill(2, short, 0)
    slots.prefill(0, np.array([9, 9, 9]), 20)  # guesses, which are not taken
    slots.prefill(0, long[20:], 20)  # beyond the memory that it had
    slots.copy(0, 1, 33)
    got: dict[tuple[int, ...], np.ndarray] = {(300, 7): slots.decode([2, 0], [5, 7])[1]}
    slots.free(2)
    got[33, 7] = slots.decode([1], [7])[0]
    slots.prefill(2, short[:5], 0)
    got[33, 7, 8] = slots.decode([2, 1], [1, 8])[1]
    for (count, *others), logits in got.items():
        ids = np.array([[*long[:count], *others]])
        whole, _ = backend.step(feeds_for(ids), backend.empty_cache(1), last=True)
        truth = truth_of(MODEL, ids)[0, -1]
        cost = np.linalg.norm(whole[0, 0] - truth)
        assert np.linalg.norm(logits - whole[0, 0]) < FLIPPED * cost < 0.1 * np.linalg.norm(truth)


def test_answers_stay_when_prompts_share_take_turns_and_are_guessed(backend: Backend) -> None:
    prefix = list(range(1, 30))
    prompts = [[*prefix, 5], [*prefix, 9, 8, 7], [*prefix, *range(60, 90)], [5, 6, 5, 6, 5, 6, 5]]
    sampling = SamplingParams(max_new_tokens=9)
    alone = [answers(backend, [prompt], sampling)[0] for prompt in prompts]
    for options in ({"max_batch": 2}, {"speculation": Speculation(4)}, {"speculation": Speculation(3, backend)}):
        assert answers(backend, prompts, sampling, **options) == alone


def test_the_memory_is_a_quarter(made: Bundle) -> None:
    rounded, plain = (load_backend(made, variant=name).slots(2, 256) for name in ("cache rounded", "optimized"))
    sizes = [sum(tensor.nbytes for tensor in slots.tensors) for slots in (rounded, plain)]  # type: ignore[attr-defined]
    model, row = made.manifest.decoder(), made.manifest.cache_rounding
    assert bytes_of_a_token(model, "fp32") * 512 == sizes[1]
    assert sizes[0] < bytes_of_a_token(model, "fp32", row) * 512 < sizes[1]
    assert 4 * sizes[0] == sizes[1] and rounded.tensors[0].dtype == np.int8  # type: ignore[attr-defined]


def test_the_choice_is_the_bundles(made: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    """It stays until another is made; without it a bundle is the same to the byte as if there were none."""
    copy = Bundle.open(shutil.copytree(made.path, tmp_path / "copy"))
    again = optimize(optimize(copy), "openvino")
    assert again.manifest == made.manifest and again.manifest.cache == ROUNDED
    assert {ROUNDED_CACHE, CALIBRATED_ON} <= judged_files(again.manifest).keys()
    plain = optimize(again, "openvino", cache=EXACT_CACHE)
    assert not plain.manifest.cache and not {ROUNDED_CACHE, CALIBRATED_ON} & plain.manifest.files.keys()
    assert not (plain.path / ROUNDED_CACHE).exists() and plain.manifest.optimized == OPTIMIZED
    assert load_backend(plain).device._kind is np.float32  # type: ignore[attr-defined]
    known = Bundle.open(shutil.copytree(bundle.path, tmp_path / "plain"))
    assert '"cache": "float"' not in (optimize(known, cache=EXACT_CACHE).path / MANIFEST).read_text()
    assert optimize(known).manifest == Bundle.open(known.path).manifest


def test_tokens_of_its_own_calibrate_it(bundle: Bundle, tmp_path: Path) -> None:
    ids = np.arange(128)
    np.save(tmp_path / "ids.npy", ids)
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))
    arguments = ["optimize", str(copy.path), "--cache", ROUNDED, "--calibration", str(tmp_path / "ids.npy")]
    assert main(arguments) == 0
    assert np.array_equal(np.load(copy.path / CALIBRATED_ON).ravel(), ids)
    assert all(array.shape == (4, 16) and (array > 0).all() for array in steps_in(copy.path / ROUNDED_CACHE).values())
    result = validate(copy.path, backend="onnxruntime", lengths=(7,))
    assert not result.caches[0].strays


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "fp16"}, "computes in fp16"),
        ({"calibrated": True}, "rounds inputs of layers"),
        ({"position_axes": True}, "takes positions on several axes"),
    ],
)
def test_what_cannot_be_rounded_is_refused(fields: dict[str, Any], reason: str, bundle: Bundle) -> None:
    said = SimpleNamespace(**{"dtype": "fp32", "calibrated": False, "position_axes": False} | fields)
    made: Any = SimpleNamespace(path="out", manifest=SimpleNamespace(export=said, decoder=bundle.manifest.decoder))
    with pytest.raises(ConfigError, match=reason):
        calibrated_on(made, None)


def test_a_bundle_stays_where_its_cache_cannot_be_rounded(spoilable: Bundle, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[999]")
    with pytest.raises(ConfigError, match="gives no token ids from 0 to 255"):
        optimize(spoilable, cache=ROUNDED, calibration=tmp_path / "ids.json")
    assert Bundle.open(spoilable.path, verify=True).manifest == spoilable.manifest
    assert not [path.name for path in spoilable.path.iterdir() if path.name.startswith("model.ort")]


def test_a_calibration_of_nothing_is_refused(spoilable: Bundle, tmp_path: Path) -> None:
    for options in ({"cache": EXACT_CACHE}, {}, {"cache": ROUNDED, "target": "openvino"}):
        with pytest.raises(ConfigError, match="calibrates nothing"):
            optimize(spoilable, calibration=tmp_path / "text", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cache is int3"):
        optimize(spoilable, cache="int3")
    (spoilable.path / MANIFEST).write_text(
        (spoilable.path / MANIFEST).read_text().rstrip().removesuffix("}") + ', "cache": "int3"}'
    )
    with pytest.raises(BundleError, match="cache is int3"):
        Bundle.open(spoilable.path)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (folder := write_native(small_decoder(), tmp_path / "model")).joinpath("tokenizer.json").unlink()
    bundle = export(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="calibration needs text as tokens"):
        optimize(bundle, cache=ROUNDED)
