"""A bundle in OpenVINO: the function that PyTorch computes, in the precision that is said, from a folder made whole."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import BACKENDS, Settings, fastest, load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import read_machine
from fope_export.backends.openvino import LONG, OpenVinoBackend, PagedSlots, _page
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import BackendError, ConfigError, ExportError
from fope_export.generation import pad_left
from fope_export.graph.export import export
from fope_export.graph.openvino import PRECISE
from fope_export.graph.optimize import optimize
from fope_export.manifest import OPENVINO
from fope_export.model.decoder import Decoder
from fope_export.parity.run import validate
from fope_export.quantizations import CACHES
from tests.conftest import small_decoder, write_native
from tests.support import same_function

MODELS: dict[str, dict[str, Any]] = {
    "fope": {},
    "grouped queries, norms and biases": {"kv_heads": 2, "qk_norm": True, "qkv_bias": True, "out_bias": True},
    "rope": {"kind": "rope"},
    "tied": {"tie_embeddings": True},
}


def made(folder: Path, model: Decoder | None = None, **config: Any) -> Bundle:
    """A small decoder's bundle with the folder for OpenVINO."""
    written = write_native(model or small_decoder(), folder / "model")
    return optimize(export(written, folder / "out", ExportConfig(**config)), "openvino")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made(tmp_path_factory.mktemp("openvino"))


@pytest.mark.parametrize("name", [*MODELS, "folded", "fp16"])
def test_logits_are_pytorchs(name: str, tmp_path: Path) -> None:
    """In a ragged batch, in uneven steps, all tokens' and the last one's."""
    model = small_decoder(**MODELS.get(name, {}))
    config = ExportConfig(fold_padding=name == "folded", dtype="fp16" if name == "fp16" else "fp32")
    backend = load_backend(made(tmp_path, model, fold_padding=config.fold_padding, dtype=config.dtype), "openvino")
    plain = EagerBackend(model.converted(config).float())
    exact = EagerBackend.in_float64(model.converted(config))
    rng = np.random.default_rng(0)
    ids, mask = pad_left([list(rng.integers(1, 256, count)) for count in (40, 7, 23)])
    feeds = feeds_for(ids, mask)
    for last in (False, True):
        outputs = []
        for each in (backend, plain, exact):
            cache, parts = each.empty_cache(3), []
            for start, end in ((0, 17), (17, 20), (20, 39), (39, 40)):
                logits, cache = each.step(feeds.part(start, end), cache, last=last)
                real = feeds.part(start, end).attention_mask[:, start - end :] != 0
                parts.append(logits[real[:, -1], 0] if last else logits[real])
            outputs.append(np.concatenate(parts))
        got, wanted, truth = outputs
        same_function(got, wanted, truth)


@pytest.mark.parametrize("config", [{"dtype": "bf16"}, {"quantize": "int4"}, {"quantize": "int8"}], ids=str)
def test_validation_passes_in_the_precision_that_it_computes_in(config: dict[str, Any], tmp_path: Path) -> None:
    bundle = made(tmp_path, **config)
    result = validate(bundle, backend="openvino", lengths=(7, 65))
    assert result.passed, result.failures
    bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert result.dtype == ("bfloat16" if config.get("dtype") and bf16 else "float32")
    names = [each.variant for each in result.tested]
    assert names == (["ir", "inputs rounded"] if "quantize" in config else ["ir"])
    assert bool(result.cost) == ("quantize" in config)


def test_another_models_folder_is_refused(small: Bundle, tmp_path: Path) -> None:
    other = made(tmp_path, small_decoder(length=32))
    spoilt = Bundle.open(shutil.copytree(small.path, tmp_path / "spoilt"))
    names = [OPENVINO, OPENVINO.replace(".xml", ".bin")]
    spoilt = spoilt.add({name: (other.path / name).read_bytes() for name in names})
    result = validate(spoilt, checkpoint=small.manifest.source.path, backend="openvino", lengths=(64,))
    assert not result.passed and any("prefill 64" in failure for failure in result.failures)


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_angles_are_float32_where_all_else_is_half(half: str, small: Bundle, tmp_path: Path) -> None:
    """Far out an angle that was rounded is another angle; without the marks float16 has none at all."""
    core, far = openvino.Core(), 999_936
    if {"f16": "FP16", "bf16": "BF16"}[half] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip(f"needs a processor that multiplies in {half}")
    unmarked = Path(shutil.copytree(small.path / "openvino", tmp_path / "unmarked")) / Path(OPENVINO).name
    text = (small.path / OPENVINO).read_text()
    marks = f'<attribute name="{PRECISE["name"]}" version="{PRECISE["version"]}" />'
    assert text.count(marks) > 10
    unmarked.write_text(text.replace(marks, ""))

    def logits(path: Path, precision: str, start: int) -> np.ndarray:
        ids = np.random.default_rng(0).integers(1, 256, (1, 48))
        feeds = feeds_for(ids)._asdict() | {"position_ids": feeds_for(ids).position_ids + start}
        hints = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": "f32"}
        run = core.compile_model(path, "CPU", hints).create_infer_request()
        return np.array(run.infer(feeds | {"beam_idx": np.zeros(1, np.int32)})["logits"])

    def error(path: Path, start: int) -> float:
        exact = logits(path, "f32", start)
        return float(np.linalg.norm(logits(path, half, start) - exact) / np.linalg.norm(exact))

    near, distant = (error(small.path / OPENVINO, start) for start in (0, far))
    assert distant < 2 * near
    if half == "f16":
        assert not error(unmarked, far) < 10 * near


def test_rows_in_any_company_are_alike_to_the_last_bit(small: Bundle) -> None:
    """With `whole`; else a row's numbers may depend on how many others there are."""
    backend = load_backend(small, "openvino", Settings(threads=1))
    alone, together = backend.slots(1, whole=True), backend.slots(3, whole=True)
    prompts = [np.arange(5, 5 + length) for length in (9, 30, 3)]
    for row, ids in enumerate(prompts):
        together.prefill(row, ids, 0)
    alone.prefill(0, prompts[1], 0)
    for token in (4, 77, 200):
        np.testing.assert_array_equal(together.decode([2, 0, 1], [1, 2, token])[2], alone.decode([0], [token])[0])


def test_pages_grow_with_what_is_in_them(small: Bundle) -> None:
    backend = load_backend(small, "openvino")
    assert isinstance(backend, OpenVinoBackend)
    roomy, tight = backend.slots(2, room=400), backend.slots(2)
    assert isinstance(tight, PagedSlots) and len(tight.tensors[0]) < len(roomy.tensors[0])
    ids = np.random.default_rng(1).integers(1, 256, 300)
    for slots in (roomy, tight):
        slots.prefill(1, ids[:3], 0)
        for start in range(0, 300, 60):
            slots.prefill(0, ids[start : start + 60], start)
    np.testing.assert_array_equal(roomy.decode([0, 1], [5, 6]), tight.decode([0, 1], [5, 6]))


def test_the_same_bundle_gives_the_same_bytes_and_one_folder(small: Bundle, tmp_path: Path) -> None:
    copied = Bundle.open(shutil.copytree(small.path, tmp_path / "again"))
    assert optimize(copied, "openvino").manifest.files == small.manifest.files
    names = {path.name for path in (small.path / "openvino").iterdir()}
    assert names == {Path(name).name for name in small.manifest.files if name.startswith("openvino/")}
    assert {"config.json", "generation_config.json", "openvino_tokenizer.xml", "openvino_detokenizer.bin"} <= names


def test_nothing_is_split_apart_that_can_be_computed_apart(small: Bundle) -> None:
    """Nor is an empty part split off, nor a number that is there taken for NaN: all are copies."""
    model = openvino.Core().read_model(small.path / OPENVINO)
    for node in model.get_ordered_ops():
        if "Split" in node.get_type_name():
            assert node.input_value(0).get_node().get_type_name() != "MatMul"
            assert all(list(port.get_partial_shape())[-1] != 0 for port in node.outputs())
    assert "IsNaN" in {node.get_type_name() for node in model.get_ops()}  # rows of padding, which others feed
    _page(model)
    assert "IsNaN" not in {node.get_type_name() for node in model.get_ops()}


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_all_that_turns_and_nothing_is_gathered_split_or_transposed(
    name: str, tmp_path: Path
) -> None:
    model = openvino.Core().read_model(made(tmp_path, small_decoder(**MODELS[name])).path / OPENVINO)
    _page(model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = compiled.get_runtime_model().get_ops()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
    assert kinds.count("RoPE") == 2 * kinds.count("PagedAttention") == 4
    assert kinds.count("Gather") == 2  # embeddings, and the tokens whose logits are wanted
    assert not {"Split", "Transpose"} & set(kinds)


def test_it_is_the_default_where_a_bundle_has_it(small: Bundle, bundle: Bundle) -> None:
    machine = read_machine()
    assert fastest(small, machine)[0] == "openvino" and fastest(bundle, machine)[0] == "onnxruntime"
    assert fastest(small, machine, optimized=False)[0] == "onnxruntime"


def test_the_command_line(small: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(shutil.copytree(small.path, tmp_path / "out"))
    assert main(["optimize", out, "--for", "openvino"]) == 0
    assert f"{OPENVINO}: the weights lie beside it" in capsys.readouterr().out
    texts = []
    for backend in ("openvino", "onnxruntime"):
        assert main(["run", out, "--prompt", "def ", "--max-new-tokens", "6", "--backend", backend]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["optimize", out, "--for", "openvino", "--no-int8-activations"]) == 2
    assert "chosen when it loads" in capsys.readouterr().err
    assert main(["export", small.manifest.source.path, out, "--quantize", "int8"]) == 0  # its folder goes with it
    assert not (Path(out) / "openvino").exists() or not list((Path(out) / "openvino").iterdir())


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"cache": "static", "capacity": 64}, "a static cache"), ({"dtype": "fp16", "cache": "static"}, "a static cache")],
    ids=str,
)
def test_what_it_has_no_form_for_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    written = export(write_native(small_decoder(), tmp_path / "model"), tmp_path / "out", ExportConfig(**config))
    with pytest.raises(ConfigError, match=reason):
        optimize(written, "openvino")
    assert Bundle.open(written.path).manifest == written.manifest


def test_refusals_say_what_to_do(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="no openvino/") as refused:
        load_backend(bundle, "openvino")
    assert "optimize --for openvino" in refused.value.hint
    with pytest.raises(BackendError, match="no openvino/"):
        validate(bundle, backend="openvino")
    with pytest.raises(ConfigError, match="nothing is optimized for abacus"):
        optimize(bundle, "abacus")
    without = type(read_machine())("Linux", "3.11", 1, (), {})
    assert "pip install" in BACKENDS["openvino"].missing(without)


def test_a_damaged_folder_does_not_load(small: Bundle, tmp_path: Path) -> None:
    spoilt = Bundle.open(shutil.copytree(small.path, tmp_path / "spoilt"))
    spoilt = spoilt.add({OPENVINO: b"<net/>"})
    with pytest.raises(BackendError, match="does not load") as refused:
        load_backend(spoilt, "openvino")
    assert "optimize --for openvino" in refused.value.hint


def test_a_tokenizer_that_is_taken_for_another_is_refused(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Bundle.open(shutil.copytree(small.path, tmp_path / "out"))
    monkeypatch.setattr("fope_export.tokens.Tokenizer.encode", lambda self, text: [1, 2, 3])
    with pytest.raises(ExportError, match=r"and the tokenizer \[1, 2, 3\]"):
        optimize(copied, "openvino")
    assert Bundle.open(copied.path).manifest == small.manifest


def test_without_a_tokenizer_it_takes_ids(tmp_path: Path) -> None:
    written = write_native(small_decoder(), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (written / name).unlink(missing_ok=True)
    made = optimize(export(written, tmp_path / "out"), "openvino")
    assert not [name for name in made.manifest.files if "tokenizer" in name]
    assert load_backend(made, "openvino").slots(1).prefill(0, np.array([1, 2]), 0).shape == (1, 256)


def test_what_bfloat16_leaves_in_rounded_pages_is_read_in_float32(native: Path, tmp_path: Path) -> None:
    """A long prompt, a short one and single tokens after both: as far from the exact variant as rounding explains."""
    config = ExportConfig(quantize="int4", rounding="nearest")
    made = optimize(export(native, tmp_path / "out", config), "openvino", cache="int8")
    ids, logits = np.random.default_rng(0).integers(1, 256, 4 * LONG + 5), []
    for variant in ("ir", "cache rounded"):
        slots = load_backend(made, "openvino", Settings(threads=1), variant=variant).slots(1)
        parts = [slots.prefill(0, ids[: 4 * LONG], 0), slots.prefill(0, ids[4 * LONG :], 4 * LONG)]
        logits.append(np.concatenate([*parts, *(slots.decode([0], [token]) for token in (7, 8, 9))]))
    exact, rounded = logits
    assert 0 < np.linalg.norm(rounded - exact) < CACHES["int8"].apart * np.linalg.norm(exact)
    assert (np.linalg.norm(rounded - exact[::-1], axis=1) > np.linalg.norm(rounded - exact, axis=1))[[0, 1, 3, 4]].all()
