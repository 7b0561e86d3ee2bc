"""Engines that TensorRT-RTX builds without a GPU, and every way to be refused one."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import BuildConfig, CacheName, ExportConfig
from fope_export.errors import BackendError, ConfigError
from fope_export.graph.export import export
from fope_export.quantizations import CACHES
from fope_export.shipped import shipped
from fope_export.tensorrt import api, compile, worker
from fope_export.tensorrt import build as building
from fope_export.tensorrt.build import build
from fope_export.tensorrt.record import plan_name
from tests.conftest import small_decoder, write_native
from tests.extensions import extended_decoder
from tests.printed import held
from tests.support import tokens


@pytest.mark.parametrize(("dtype", "cache", "fold"), [("fp16", "dynamic", False), ("bf16", "static", True)])
def test_the_shipped_model_builds_with_and_without_the_plugin(
    dtype: str, cache: CacheName, fold: bool, tmp_path: Path
) -> None:
    config = ExportConfig(dtype=dtype, cache=cache, fold_padding=fold)
    made = export(shipped("fope"), tmp_path / "bundle", config)
    before, layers = made.model.read_bytes(), made.manifest.decoder().num_layers
    for plugin in (True, False):
        reported: list[tuple[str, int, int]] = []
        made, record = build(made, BuildConfig(plugin=plugin), report=lambda *step, seen=reported: seen.append(step))
        plan = (made.path / "engines/tensorrt-rtx.plan").read_bytes()
        assert record.architectures == ("sm86", "sm89", "sm120") and record.decoder_layers == layers
        assert record.plugin_layers == record.layers.get("PLUGIN_V3", 0) == (layers if plugin else 0)
        assert record.layers.get("KV_CACHE_UPDATE", 0) == (2 * layers if cache == "static" else 0)
        assert record.layers.get("ROTARY_EMBEDDING", 0) == (0 if plugin else 2 * layers)
        assert len(plan) == record.plan_bytes and (b"kv_heads_per_group" in plan) == plugin  # a field of the plugin
        assert reported and all(done <= total for _, done, total in reported)
        assert (
            json.loads((made.path / "engines/tensorrt-rtx.json").read_bytes())["plugin_layers"] == record.plugin_layers
        )
    assert made.model.read_bytes() == before and not Bundle.open(made.path).damaged()
    backend = load_backend(made, "onnxruntime")  # the same file still runs here
    logits, _ = backend.step(feeds_for(tokens(2, 5)), backend.empty_cache(2))
    assert logits.shape == (2, 5, 256)


def test_a_general_rotation_builds_with_and_without_the_plugin(tmp_path: Path) -> None:
    checkpoint = write_native(extended_decoder(axes=3, bases=2, num_layers=1), tmp_path / "checkpoint")
    made = export(checkpoint, tmp_path / "bundle", ExportConfig(dtype="fp16", position_axes=True))
    for plugin in (True, False):
        config = BuildConfig(target="tensorrt-rtx:sm89", plugin=plugin, max_batch=1, max_length=64)
        made, record = build(made, config)
        assert record.plugin_layers == record.layers.get("PLUGIN_V3", 0) == int(plugin)
        assert record.layers.get("ROTARY_EMBEDDING", 0) == (0 if plugin else 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(bytes(range(256))),
        lambda path: path.write_bytes(b""),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.parent.rmdir(), path.parent.touch()),
    ],
    ids=["damaged", "empty", "a folder", "not writable"],
)
def test_a_timing_cache_only_saves_time(spoil: Callable[[Path], object], tmp_path: Path, spoilable: Bundle) -> None:
    made = tmp_path / "cache" / "timing"
    worker._keep(made, b"earlier")
    assert made.read_bytes() == b"earlier" and list(made.parent.iterdir()) == [made]
    spoil(made)
    config = BuildConfig(target="tensorrt-rtx:sm89", plugin=False, max_batch=1, max_length=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_timing_cache", lambda config: made)
        built, _ = build(spoilable, config)
    assert not Bundle.open(built.path).damaged() and "engines/tensorrt-rtx-sm89.plan" in built.manifest.files


def test_float32_builds_too_and_for_one_gpu(spoilable: Bundle) -> None:
    built, record = build(spoilable, BuildConfig(target="tensorrt-rtx:sm89", max_batch=1, max_length=64))
    assert record.plugin_layers == 2 and record.architectures == ("sm89",) and record.dtype == "fp32"
    assert (built.path / "engines/tensorrt-rtx-sm89.plan").is_file()
    assert not list(built.path.glob(".*"))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "cache"),
    [
        (1, 1, "fp16", "dynamic"),
        (2, 1, "bf16", "static"),
        (3, 1, "fp16", "static"),
        (3, 3, "bf16", "dynamic"),
        (4, 2, "bf16", "static"),
        (4, 4, "fp16", "dynamic"),
    ],
)
def test_any_number_of_heads_builds_and_attention_stays_fused(
    heads: int, kv_heads: int, dtype: str, cache: CacheName, tmp_path: Path
) -> None:
    checkpoint = write_native(small_decoder(heads=heads, kv_heads=kv_heads, num_layers=1), tmp_path / "checkpoint")
    made = export(checkpoint, tmp_path / "bundle", ExportConfig(dtype=dtype, cache=cache))
    made, record = build(made, BuildConfig(target="tensorrt-rtx:sm89", plugin=False, timing_cache=False))
    plan = (made.path / plan_name(record.target)).read_bytes()
    assert (b"_gemm_mha_v2" in plan) == (heads > 1)  # the fused kernel's name; a lone head has none


def test_the_command_line_says_what_was_built(spoilable: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(spoilable.path), "--no-plugin", "--max-length", "64", "--version-compatible"]) == 0
    assert "2 decoder layers, no plugin, up to 4 rows and 64 tokens, for sm86, sm89, sm120" in capsys.readouterr().out
    assert main(["inspect", str(spoilable.path)]) == 0
    assert "tensorrt-rtx  2 decoder layers, no plugin" in capsys.readouterr().out
    assert main(["inspect", str(spoilable.path), "--json"]) == 0
    assert held("inspect", capsys.readouterr().out)["engines"][0]["plugin_layers"] == 0
    assert main(["build", str(spoilable.path), "--no-plugin", "--max-length", "64", "--json"]) == 0
    assert held("build", capsys.readouterr().out)["decoder_layers"] == 2


def test_a_quantized_bundle_is_refused_before_anything_starts(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export(native, tmp_path / "bundle", ExportConfig(quantize="int4"))
    monkeypatch.setattr(api, "check_installed", lambda library: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match="int4 weights for an operator that only ONNX Runtime has") as caught:
        build(made)
    assert "int8-qdq" in caught.value.hint


def test_a_bundle_with_rounded_caches_is_refused_before_anything_starts(
    spoilable: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with spoilable.changing() as now:
        rounding = now.put({}, cache=next(iter(CACHES)))
    monkeypatch.setattr(api, "check_installed", lambda library: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match="keeps keys and values as int8, and TensorRT") as caught:
        build(rounding)
    assert "--cache float" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "dtype", "cache", "target"),
    [
        ("int8-qdq", "fp16", "static", "tensorrt-rtx"),
        ("int8-qdq", "fp32", "dynamic", "tensorrt-rtx"),
        ("fp8-qdq", "bf16", "dynamic", "tensorrt-rtx:sm89,sm120"),
    ],
)
def test_linear_layers_of_8_bits_build_with_and_without_the_plugin(
    kind: str, dtype: str, cache: CacheName, target: str, native: Path, tmp_path: Path
) -> None:
    made = export(native, tmp_path / "bundle", ExportConfig(quantize=kind, dtype=dtype, cache=cache))
    for plugin in (True, False):
        made, record = build(made, BuildConfig(target=target, plugin=plugin))
        assert record.plugin_layers == record.layers.get("PLUGIN_V3", 0) == (2 if plugin else 0)
        assert record.layers["QUANTIZE"] == 8 and record.layers["DEQUANTIZE"] == 16


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "dtype", "target", "older", "message", "back"),
    [
        ("int4-awq", "fp16", "sm86,sm89,sm120", "sm75", "sm75 has no int4", 8),
        ("nvfp4", "bf16", "sm120", "sm86,sm89,sm120", "sm86, sm89 has no float4", 16),
    ],
)
def test_weights_of_4_bits_build_for_gpus_that_have_them(
    kind: str, dtype: str, target: str, older: str, message: str, back: int, native: Path, tmp_path: Path
) -> None:
    made = export(native, tmp_path / "bundle", ExportConfig(quantize=kind, dtype=dtype))
    with pytest.raises(ConfigError, match=message) as caught:
        build(made, BuildConfig(target=f"tensorrt-rtx:{older}"))
    assert f"--target tensorrt-rtx:{target}" in caught.value.hint
    config = BuildConfig(target=f"tensorrt-rtx:{target}", plugin=False, max_batch=1, max_length=64)
    made, record = build(made, config)
    assert record.layers["DEQUANTIZE"] == back and "QUANTIZE" not in record.layers and not made.damaged()


def test_float8_and_an_older_gpu(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export(native, tmp_path / "bundle", ExportConfig(quantize="fp8-qdq"))
    monkeypatch.setattr(api, "check_installed", lambda library: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match="sm86 has no float8") as caught:
        build(made)
    assert "tensorrt-rtx:sm89,sm120" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "tensorrt-rtx:sm90"], "has no sm90"),
        (["--target", "tpu"], "target is 'tpu'"),
        (["--max-length", "0"], "max_length: Expected `int` >= 1"),
    ],
)
def test_misuse_on_the_command_line(
    options: list[str], message: str, spoilable: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(spoilable.path), "--no-plugin", *options]) == 2
    told = capsys.readouterr().err
    assert message in told and "hint:" in told
    assert not (spoilable.path / "engines").exists() and not list(spoilable.path.glob(".engine-*"))


def test_bfloat16_and_an_older_gpu(tmp_path: Path, native: Path) -> None:
    made = export(native, tmp_path / "bundle", ExportConfig(dtype="bf16"))
    with pytest.raises(ConfigError, match="sm75 has no bfloat16"):
        build(made, BuildConfig(target="tensorrt-rtx:sm75"))


def test_no_library_and_an_old_one(spoilable: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, message in (({}, "tensorrt-rtx is not installed"), ({"tensorrt-rtx": "1.2.0"}, "is 1.2.0, and 1.7")):
        monkeypatch.setattr(api, "_installed", lambda distribution, installed=installed: installed)
        with pytest.raises(BackendError, match=message) as caught:
            build(spoilable)
        assert "[tensorrt-rtx]" in caught.value.hint


def test_no_compiler(spoilable: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "find_toolchain", partial(compile.find_toolchain, {}, lambda name: []))
    with pytest.raises(BackendError, match="no CUDA compiler"):
        build(spoilable)


def library(folder: Path, source: str) -> Path:
    """A shared library of a few lines."""
    path = folder / "plugin.so"
    (folder / "plugin.cpp").write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", path, folder / "plugin.cpp"], check=True)
    return path


NO_CREATOR = """
extern "C" void* const* getCreators(int& count) { static void* none[1]; count = 0; return none; }
extern "C" void setLoggerFinder(void*) {}
"""
CRASH = """
#include <cstdio>
#include <cstdlib>
extern "C" void* const* getCreators(int& count) { std::fputs("giving up\\n", stderr); std::abort(); }
extern "C" void setLoggerFinder(void*) {}
"""
PLUGINS = {
    "not a library": (lambda folder: (folder / "no.so").write_text("") or folder / "no.so", "does not load the plugin"),
    "no entry point": (lambda folder: library(folder, "int x;"), "does not load the plugin .*getCreators"),
    "no creator": (lambda folder: library(folder, NO_CREATOR), "does not load the plugin .*No creator"),
    "a crash": (lambda folder: library(folder, CRASH), "ended its process with signal SIGABRT: giving up"),
}


@pytest.mark.parametrize(("make", "message"), PLUGINS.values(), ids=PLUGINS)
def test_a_plugin_that_is_none(
    make: Callable[[Path], Path], message: str, spoilable: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path)
    monkeypatch.setattr(compile, "build_plugin", lambda *_: made)
    with pytest.raises(BackendError, match=message):
        build(spoilable)
    assert not (spoilable.path / "engines").exists()


def edit(bundle: Bundle, change: Callable[[onnx.NodeProto], None]) -> Bundle:
    """The bundle with its FopeRotary nodes changed behind its back."""
    model = onnx.load(bundle.model, load_external_data=False)
    for node in model.graph.node:
        if node.domain == "fope":
            change(node)
    onnx.save(model, bundle.model)
    return Bundle.open(bundle.path, verify=False)


def other_version(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "plugin_version").s = b"7"


def odd_heads(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "head_dim").i = 15


def test_the_plugins_own_words_are_passed_on(spoilable: Bundle) -> None:
    with pytest.raises(BackendError, match="head_dim is 15, and channel pairs need an even one"):
        build(edit(spoilable, odd_heads))


def other_operator(node: onnx.NodeProto) -> None:
    node.op_type = "Mystery"


def test_nodes_that_do_not_match_the_plugin(spoilable: Bundle) -> None:
    with pytest.raises(BackendError, match="0 of 2 FopeRotary nodes became plugin layers"):
        build(edit(spoilable, other_version))


def test_an_operator_that_is_not_supported(spoilable: Bundle) -> None:
    with pytest.raises(BackendError, match=r"Mystery layers\.0\.attention\.rotary/FopeRotary"):
        build(edit(spoilable, other_operator), BuildConfig(plugin=False))
