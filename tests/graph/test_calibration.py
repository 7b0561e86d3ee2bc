"""Calibration: what is measured, on which tokens, the same every time, and every way to have nothing to measure."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fope_export.cli import main
from fope_export.config import ExpertsConfig, ExportConfig
from fope_export.corpus import python_source
from fope_export.errors import BackendError, ConfigError, ExportError, install
from fope_export.graph import calibration
from fope_export.graph.calibration import calibrate, calibration_windows
from fope_export.graph.export import export
from tests.conftest import small_decoder, write_native

WINDOWS = np.random.default_rng(0).integers(0, 256, (3, 17))


def test_ranges_are_the_largest_values_that_pytorch_sees(capfd: pytest.CaptureFixture[str]) -> None:
    model, seen = small_decoder(), {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in ("int8-qdq", "fp8-qdq"):
        ranges = calibrate(model, kind, WINDOWS)
        linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        assert ranges.keys() == linear.keys() - {"lm_head"}
        for name, part in linear.items():
            part.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: [*seen.get(name, []), x[0]]}))
        for ids in torch.from_numpy(WINDOWS)[:, None]:
            model(ids, torch.ones_like(ids), torch.arange(17)[None], model.empty_cache(1))
        for name, each in ranges.items():
            assert each.inputs == pytest.approx(float(torch.cat(seen[name]).abs().max()), rel=1e-5)
            rows = linear[name].weight.abs()
            wanted = rows.amax(1) if kind == "int8-qdq" else rows.amax()
            np.testing.assert_array_equal(each.weight, wanted.numpy())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_a_router_is_not_measured_and_half_types_are_measured_in_float32() -> None:
    experts = ExpertsConfig(count=4, per_token=2, intermediate_size=32, groups=1, normalize=True, layers=(1,))
    model = small_decoder(experts=experts).to(torch.bfloat16)
    ranges = calibrate(model, "int8-qdq", WINDOWS)
    assert len(ranges) == 6 and not any("router" in name for name in ranges)
    assert model.embed.weight.dtype == torch.bfloat16


def test_inputs_that_are_not_finite_are_an_error() -> None:
    model = small_decoder()
    model.get_parameter("layers.1.attn_norm.weight")[0] = float("inf")
    with pytest.raises(ExportError, match="cannot calibrate the model: detected inf"):
        calibrate(model, "int8-qdq", WINDOWS)


def test_windows_come_from_all_of_the_text_and_are_the_same_again(native: Path, tmp_path: Path) -> None:
    windows = calibration_windows(native, None, 256, 64)
    assert windows.shape == (calibration.SAMPLED // 64, 64) and windows.dtype == np.int64
    np.testing.assert_array_equal(windows, calibration_windows(native, None, 256, 64))
    text = python_source(held_out=False)
    for row, start in ((windows[0], 0), (windows[64], len(text) // 2)):
        assert bytes(row.astype(np.uint8)) == text[start : start + 64]
    (tmp_path / "short.txt").write_text("naïve")
    assert calibration_windows(native, tmp_path / "short.txt", 256, 64).shape[1] == 64
    for name, content in (("ids.json", json.dumps([[1, 2], [3, 4]])), ("ids.npy", None)):
        np.save(tmp_path / name, np.arange(1, 5)) if content is None else (tmp_path / name).write_text(content)
        assert calibration_windows(tmp_path, tmp_path / name, 256, 64).tolist() == [[1, 2, 3, 4]]
    np.save(tmp_path / "many.npy", np.zeros(calibration.SAMPLED + 99, np.int32))
    assert calibration_windows(tmp_path, tmp_path / "many.npy", 256, 64).size == calibration.SAMPLED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.json", "[1, 256]", "gives no token ids from 0 to 255"),
        ("ids.json", "[]", "float64, expected integers"),
        ("ids.json", "[1.5]", "float64, expected integers"),
        ("ids.json", "[", "Expecting value"),
        ("ids.npy", "no array", "ids.npy: "),
        ("empty.txt", "", "gives no token ids"),
    ],
)
def test_a_file_that_gives_no_tokens(name: str, content: str, message: str, native: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        calibration_windows(native, tmp_path / name, 256, 64)
    assert "--calibration FILE" in caught.value.hint


class NotInstalled:
    """Finds no Model Optimizer."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "modelopt":
            raise ModuleNotFoundError(f"No module named {name!r}", name="modelopt")


def test_what_stands_in_the_way_is_one_message_and_nothing_is_written(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bare = tmp_path / "out", write_native(small_decoder(), tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json") as caught:
        export(bare, out, ExportConfig(quantize="int8-qdq"))
    assert "--calibration FILE" in caught.value.hint
    assert main(["export", str(native), str(out), "--calibration", str(tmp_path / "x.txt")]) == 2
    assert "calibrates nothing" in capsys.readouterr().err
    missing = ["export", str(native), str(out), "--quantize", "fp8-qdq", "--calibration", str(tmp_path / "x.txt")]
    assert main(missing) == 2 and "x.txt" in capsys.readouterr().err
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(BackendError, match=r"modelopt\.torch\.quantization is not installed") as absent:
        export(native, out, ExportConfig(quantize="int8-qdq"))
    assert absent.value.hint == install("modelopt") and not out.exists()
