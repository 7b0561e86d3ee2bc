"""Bundles of format version 1 are read, run and brought to the names of now."""

import json

import pytest

from fope_export.backends.choose import BACKENDS, load_backend
from fope_export.backends.ort_optimized import OptimizedOrtBackend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import BuildConfig
from fope_export.graph.optimize import optimize
from fope_export.manifest import MANIFEST
from fope_export.parity.run import validate
from fope_export.tensorrt.build import build
from fope_export.tensorrt.record import newest_engine, plan_in
from tests.tensorrt.an_engine import RECORD

FORMER = {
    "model.ort.onnx": "model.cpu.onnx",
    "engines/tensorrt-rtx-sm89.plan": "engines/tensorrt-rtx:sm89.plan",
    "engines/tensorrt-rtx-sm89.json": "engines/tensorrt-rtx:sm89.json",
}


@pytest.fixture
def former(spoilable: Bundle) -> Bundle:
    """As the version before wrote it, optimized and with an engine."""
    made = optimize(spoilable)
    record = RECORD | {"target": "tensorrt-rtx:sm89", "model_sha256": made.manifest.files["model.onnx"]}
    record["plan_sha256"] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing
    plan, said = [name for name in FORMER if "engines" in name]
    made = made.add({plan: b"", said: json.dumps(record).encode()})
    data = json.loads((made.path / MANIFEST).read_text())
    data |= {"format_version": 1, "files": {FORMER.get(name, name): value for name, value in data["files"].items()}}
    data["source"]["dialect"] = data["source"].pop("layout")
    (made.path / MANIFEST).write_text(json.dumps(data))
    for name, before in FORMER.items():
        (made.path / name).rename(made.path / before)
    return Bundle.open(made.path)


def test_it_is_read_whole(former: Bundle) -> None:
    assert former.manifest.source.layout == "native" and not former.damaged()
    assert isinstance(load_backend(former), OptimizedOrtBackend)
    assert plan_in(former, newest_engine(former)) == "engines/tensorrt-rtx:sm89.plan"
    assert BACKENDS["onnxruntime"].variant(former).files(former) == ("model.cpu.onnx", "model.onnx.data")


def test_it_is_validated_and_says_so_in_the_form_of_now(former: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(former.path), "--lengths", "7", "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)["tested"]
    assert [each["files"].keys() for each in tested][1] == {"model.cpu.onnx", "model.onnx.data"}
    data = json.loads((former.path / MANIFEST).read_text())
    assert data["format_version"] == 2 and data["source"]["layout"] == "native" and "dialect" not in data["source"]
    assert not Bundle.open(former.path).damaged()


def test_optimizing_again_leaves_one_file(former: Bundle) -> None:
    made = optimize(former)
    assert made.manifest.optimized == "model.ort.onnx" and not (made.path / "model.cpu.onnx").exists()
    assert "model.ort.onnx" in (made.path / "genai_config.json").read_text()
    assert not Bundle.open(made.path).damaged() and validate(made, lengths=(7,)).passed


def test_building_again_leaves_one_engine_with_a_name_that_every_file_system_takes(former: Bundle) -> None:
    made, _ = build(former, BuildConfig(target="tensorrt-rtx:sm89", plugin=False, max_batch=1, max_length=64))
    assert {name for name in made.manifest.files if "engines" in name} == {*FORMER} - {"model.ort.onnx"}
    assert {path.name for path in (made.path / "engines").iterdir()} == {
        "tensorrt-rtx-sm89.plan",
        "tensorrt-rtx-sm89.json",
    }
    assert plan_in(made, newest_engine(made)) == "engines/tensorrt-rtx-sm89.plan"
