"""The file for ONNX Runtime alone: the same numbers as the portable one, and no row that could be wrong unnoticed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from fope_export.backends.base import Feeds, feeds_for
from fope_export.backends.choose import Settings, load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.ort_optimized import OptimizedOrtBackend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import BackendError, ConfigError, ExportError
from fope_export.fope.rotary import FopeRotary
from fope_export.generation import pad_left
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.manifest import OPTIMIZED
from fope_export.model.checkpoint import source_of
from fope_export.parity.copies import exact
from fope_export.parity.run import validate
from fope_export.serving.sampling import SamplingParams
from tests.conftest import mixture, small_decoder, write_native
from tests.support import EPS, answers, same_function, truth_of

MODELS: dict[str, dict[str, Any]] = {
    "fope": {},
    "grouped queries, norms and biases": {"kv_heads": 2, "qk_norm": True, "qkv_bias": True, "out_bias": True},
    "rope": {"kind": "rope"},
    "tied": {"tie_embeddings": True},
    "one layer": {"num_layers": 1},
    "experts": {"experts": mixture(layers=(0, 1))},
    "experts in groups": {"experts": mixture(groups=2, normalize=False)},
}


@pytest.fixture(scope="module", params=[*MODELS, "folded", "fp16", "layers that share"])
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The portable and the optimized file of one bundle, both running, and PyTorch in float64."""
    model = small_decoder(**MODELS.get(request.param, {}))
    if request.param == "layers that share":
        for attention in model.attentions():
            attention.rotary = FopeRotary.from_spectrum(model.attentions()[0].rotary.spectrum)
    folder = tmp_path_factory.mktemp("optimize")
    config = ExportConfig(fold_padding=request.param == "folded", dtype="fp16" if request.param == "fp16" else "fp32")
    made = optimize(export(write_native(model, folder / "model"), folder / "out", config))
    exact = EagerBackend.in_float64(model.converted(config))
    return load_backend(made, settings=Settings(optimized=False)), load_backend(made), exact


@pytest.fixture(scope="module")
def pair(trio: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """The two files."""
    return trio[:2]


def each(backends: tuple[Any, ...], feeds: Feeds, steps: tuple[int, ...], *, last: bool = False) -> list[np.ndarray]:
    """Logits of the real tokens, step after step."""
    outputs = []
    for backend in backends:
        cache, start, parts = backend.empty_cache(len(feeds.input_ids)), 0, []
        for step in steps:
            logits, cache = backend.step(feeds.part(start, start + step), cache, last=last)
            parts.append(logits)
            start += step
        outputs.append(np.concatenate(parts, axis=1))
    return outputs


@pytest.mark.parametrize("steps", [(40,), (17, 3, 20), (1,) * 40, (39, 1)], ids=str)
def test_logits_are_those_of_the_portable_file(trio: tuple[Any, Any, Any], steps: tuple[int, ...]) -> None:
    assert isinstance(trio[1], OptimizedOrtBackend)
    rng = np.random.default_rng(0)
    ids, mask = pad_left([list(rng.integers(1, 256, count)) for count in (40, 7, 23)])
    for last in (False, True):
        wanted, got, truth = each(trio, feeds_for(ids, mask), steps, last=last)
        assert wanted.shape == got.shape
        real = mask.astype(bool)[:, np.cumsum(steps) - 1 if last else slice(None)]
        same_function(got[real], wanted[real], truth[real])
        assert not got[~real].any()  # what is no token is not computed


def test_tokens_stay_when_prompts_share_and_take_turns(pair: tuple[Any, Any]) -> None:
    if pair[1]._manifest.export.dtype == "fp16":
        return  # a tie may fall either way
    prefix = list(range(1, 30))
    prompts = [[*prefix, 5], [*prefix, 9, 8, 7], [*prefix, *range(60, 90)], [*prefix, 11, 12]]
    alone = [answers(pair[0], [prompt], SamplingParams(max_new_tokens=9))[0] for prompt in prompts]
    for backend in pair:
        for limit in (0, 2):
            assert answers(backend, prompts, SamplingParams(max_new_tokens=9), max_batch=limit) == alone


def test_a_cache_grows_and_is_written_in_place(pair: tuple[Any, Any]) -> None:
    ids, slots = np.ones(300, np.int64), pair[1].slots(1, 64)
    first = slots.tensors[0]
    assert first.shape[2] == 256
    slots.prefill(0, ids[:100], 0)
    assert slots.tensors[0] is first and slots.lengths.tolist() == [100]
    slots.prefill(0, ids[100:], 100)
    assert slots.tensors[0].shape[2] == 512 and slots.lengths.tolist() == [300]
    assert slots.tensors[0][0, :, :300].any(2).any(0).all() and not slots.tensors[0][:, :, 300:].any()


def test_an_old_cache_is_good_after_another_grew_what_they_share(pair: tuple[Any, Any]) -> None:
    """It must not go on with the memory that was given back."""
    backend, caches = pair[1], []
    _, cache = backend.step(feeds_for(np.arange(1, 255)[None]), pair[1].empty_cache(1))
    for total in (255, 256, 257):  # the last does not fit any more
        caches.append(cache)
        _, cache = backend.step(feeds_for(np.array([[7]]), np.ones((1, total), np.int64)), cache)
    assert cache.slots.tensors[0].shape[2] == 512
    before = cache.slots.tensors[0][0, :, 255].copy()
    backend.step(feeds_for(np.array([[9]]), np.ones((1, 256), np.int64)), caches[1])
    assert not np.array_equal(cache.slots.tensors[0][0, :, 255], before)


def test_decoding_is_captured_in_a_cuda_graph(optimized: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes without a GPU: every step of decoding names the graph of the memory that it works in, and has
    its inputs where the one before had them; prompts are not captured; graphs that cannot be repeated are forgotten.
    """
    backend = OptimizedOrtBackend(optimized, cuda_graph=True)
    plain, session, named, placed = OptimizedOrtBackend(optimized), backend._session, [], []
    forgotten: list[int] = []

    class Spy:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            named.append(options.get_run_config_entry("gpu_graph_id"))
            session.run_with_iobinding(binding, options)

        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

    monkeypatch.setattr(backend, "_session", Spy())
    monkeypatch.setattr(backend.graphs, "_session", SimpleNamespace(release_captured_graph=forgotten.append))
    both = [each.slots(2, 256) for each in (backend, plain)]
    for slots in both:
        slots.prefill(0, np.arange(1, 255), 0)
        slots.prefill(1, np.array([5]), 0)
    for rows in ([0], [0, 1], [0], [1]):  # the third outgrows the memory
        got, wanted = (slots.decode(rows, [7] * len(rows)) for slots in both)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=16 * EPS * np.abs(wanted).max())
        decoding = both[0]._decoding
        assert decoding
        placed.append([array.ctypes.data for array in decoding.bound._inputs.values()])
    both[0].close()
    assert named == ["-1", "-1", "1", "1", "1", "1"] and forgotten == [1, 1]
    assert placed[0] == placed[1] != placed[2] == placed[3]


def test_a_step_has_nothing_that_a_cuda_graph_cannot_record(optimized: Bundle) -> None:
    """The host waits for the numbers of Size and NonZero, and GatherND copies from its memory in every step."""
    nodes = onnx.load(optimized.path / OPTIMIZED, load_external_data=False).graph.node
    assert {node.op_type for node in nodes}.isdisjoint({"Size", "NonZero", "GatherND"})


def test_a_mask_that_contradicts_the_cache_is_refused(pair: tuple[Any, Any]) -> None:
    ids, cache = np.ones((1, 3), np.int64), pair[1].empty_cache(1)
    for mask in ([[1, 1, 1, 1]], [[1, 0, 1]], [[1, 1, 0]]):
        with pytest.raises(BackendError, match="does not fit the cache"):
            pair[1].step(feeds_for(ids, np.array(mask)), cache)


@pytest.fixture
def optimized(spoilable: Bundle) -> Bundle:
    return optimize(spoilable)


def test_a_gpu_that_is_not_there(optimized: Bundle) -> None:
    with pytest.raises(BackendError, match="ONNX Runtime has no CUDAExecutionProvider, only") as caught:
        OptimizedOrtBackend(optimized, device="cuda")
    assert "onnxruntime-gpu" in caught.value.hint


def session(bundle: Bundle) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(bundle.path / OPTIMIZED, options, providers=["CPUExecutionProvider"])


def test_rows_are_padded_on_the_right_or_the_run_fails(optimized: Bundle) -> None:
    """What another program may do with the file: GenAI pads on the right, Optimum on the left."""
    running = session(optimized)
    ids, mask = np.array([[5, 6, 7, 8], [9, 8, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    positions = np.array([[0, 1, 2, 3], [0, 1, 0, 0]])
    past = {p.name: np.zeros((2, 4, 0, 16), np.float32) for p in running.get_inputs() if p.name.startswith("past")}
    logits, *_ = running.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past)
    portable = load_backend(optimized, settings=Settings(optimized=False))
    for row, count in enumerate((4, 2)):
        wanted, _ = portable.step(feeds_for(ids[row : row + 1, :count]), portable.empty_cache(1))
        truth = truth_of(source_of(optimized).model, ids[row : row + 1, :count])
        same_function(logits[row, -1], wanted[0, -1], truth[0, -1])
    for wrong in ([[1, 1, 1, 1], [0, 0, 1, 1]], [[1, 1, 0, 1], [1, 1, 1, 1]]):
        with pytest.raises(Exception, match="padding_belongs_on_the_right"):
            running.run(None, {"input_ids": ids, "attention_mask": np.array(wrong), "position_ids": positions} | past)


def test_the_weights_are_not_stored_twice(optimized: Bundle) -> None:
    model = onnx.load(optimized.path / OPTIMIZED, load_external_data=False)
    outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert {"embed.weight", "lm_head.weight.T"} <= outside
    assert {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"} == {
        "model.onnx.data"
    }
    assert not optimized.damaged() and OPTIMIZED in optimized.manifest.files
    assert '"filename": "model.ort.onnx"' in (optimized.path / "genai_config.json").read_text()


def test_nodes_of_a_layer(optimized: Bundle) -> None:
    """Four linear layers, two norms with their sums and the gate are 10; rotation, cache and attention take four. In
    the last layer a sum stays alone, because the last norm sees other rows.
    """
    counts = []
    for name in ("model.onnx", OPTIMIZED):
        model = onnx.load(optimized.path / name, load_external_data=False)
        nodes = [n for n in model.graph.node if n.name.startswith("layers.1")]
        body = len(model.functions[0].node) - 1 if model.functions else 0
        counts.append(len(nodes) + body)
        assert [f.name for f in model.functions] == (["FopeRotary"] if body else [])
    assert counts == [91, 15]


def test_only_a_growing_cache_is_optimized(static_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="has a static cache"):
        optimize(static_bundle)


def test_a_file_that_looks_otherwise_is_refused(spoilable: Bundle) -> None:
    model = onnx.load(spoilable.model, load_external_data=False)
    next(n for n in model.graph.node if n.op_type == "Attention").op_type = "Attentive"
    onnx.save(model, spoilable.model)
    with pytest.raises(ExportError, match="is read by 0 Attention nodes"):
        optimize(spoilable)
    assert not list(spoilable.path.glob(".*")) and not (spoilable.path / OPTIMIZED).exists()


def test_the_command_line(spoilable: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for options in ([], ["--no-optimized"]):
        assert main(["optimize", str(spoilable.path)]) == 0
        capsys.readouterr()
        assert main(["run", str(spoilable.path), "--prompt-ids", "5,6", "--max-new-tokens", "5", *options]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_validation_covers_both_files(optimized: Bundle) -> None:
    result = validate(optimized, lengths=(7, 64))
    assert result.passed
    names = [case.name for case in result.cases]
    assert names[:4] == ["prefill 7", "prefill 7, optimized", "prefill 64", "prefill 64, optimized"]
    model = onnx.load(optimized.path / OPTIMIZED, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "series.Sin")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[:, :32] = values[:, 31::-1]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, optimized.path / OPTIMIZED)
    result = validate(optimized, lengths=(7, 64))
    assert {case.name for case in result.cases if not case.verdict.passed} >= {"prefill 7, optimized"}
    assert all(case.verdict.passed for case in result.cases if not case.name.endswith("optimized"))


def test_rounded_activations_cost_what_the_report_says(native: Path, tmp_path: Path) -> None:
    exported = export(native, tmp_path / "out", ExportConfig(quantize="int4"))
    for rounded in (True, False):
        made = optimize(exported, int8_activations=rounded)
        model = onnx.load(made.path / OPTIMIZED, load_external_data=False)
        levels = {a.i for n in model.graph.node for a in n.attribute if a.name == "accuracy_level"}
        assert levels == ({4} if rounded else {1})
        ids = np.arange(1, 60)[None]
        with exact(made, OPTIMIZED) as copied:
            backends = OptimizedOrtBackend(made), OptimizedOrtBackend(copied)
        logits = [backend.step(feeds_for(ids), backend.empty_cache(1))[0] for backend in backends]
        assert (np.abs(logits[0] - logits[1]).max() > 1e-4) == rounded
        assert validate(made, lengths=(7,)).passed
