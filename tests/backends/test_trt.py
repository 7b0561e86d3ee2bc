"""The TensorRT backend: its refusals everywhere, its numbers where there is a GPU."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fope_export import validate
from fope_export.backends.base import feeds_for
from fope_export.backends.machine import read_machine
from fope_export.backends.trt import TrtBackend, limits_of, sizes_of
from fope_export.bundle import Bundle
from fope_export.config import BuildConfig, CacheName, ExportConfig
from fope_export.errors import BackendError
from fope_export.generation import generate
from fope_export.graph.export import export
from fope_export.serving.sampling import SamplingParams
from fope_export.shipped import shipped
from fope_export.tensorrt.build import build
from fope_export.tensorrt.record import newest_engine


@pytest.fixture
def built(bundle: Bundle, tmp_path: Path) -> Bundle:
    copied = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    return build(copied, BuildConfig(plugin=False, max_batch=2, max_length=64))[0]


def test_a_bundle_without_an_engine(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="has no engine") as caught:
        newest_engine(bundle)
    assert "fope-export build" in caught.value.hint


def test_the_record_tells_limits_and_sizes(built: Bundle) -> None:
    assert tuple(limits_of(built)) == (2, 64)
    sizes = sizes_of(feeds_for(np.zeros((2, 3), np.int64), np.ones((2, 10), np.int64)), newest_engine(built))
    assert sizes == {"batch": 2, "sequence": 3, "total_sequence": 10, "past_sequence": 7}


def test_an_engine_of_another_model_or_another_plan(built: Bundle) -> None:
    record = built.path / "engines/tensorrt-rtx.json"
    (built.path / "engines/tensorrt-rtx.plan").write_bytes(b"other")
    with pytest.raises(BackendError, match="not the plan"):
        newest_engine(built)
    text = record.read_text()
    record.write_text(text.replace(built.manifest.files["model.onnx"], "0" * 64))
    with pytest.raises(BackendError, match="built from another"):
        newest_engine(built)
    record.write_text("{}")
    with pytest.raises(BackendError, match="not an engine's record"):
        newest_engine(built)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_with_the_reason(built: Bundle) -> None:
    with pytest.raises(BackendError, match="sees no CUDA device"):
        TrtBackend(built)
    with pytest.raises(BackendError, match="no NVIDIA GPU found"):
        validate(built, backend="tensorrt")


LIBRARIES_HERE = [name for name in ("tensorrt", "tensorrt-rtx") if name in read_machine().packages]


@pytest.mark.gpu
@pytest.mark.parametrize("target", LIBRARIES_HERE)
@pytest.mark.parametrize("plugin", [True, False])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_engine_computes_what_pytorch_computes(
    dtype: str, cache: CacheName, plugin: bool, target: str, tmp_path: Path
) -> None:
    made = export(shipped("fope"), tmp_path / "bundle", ExportConfig(dtype=dtype, cache=cache))
    made, _ = build(made, BuildConfig(target=target, plugin=plugin))
    result = validate(made, backend="tensorrt")
    assert result.passed, result.broken or [case.name for case in result.cases if not case.verdict.passed]


@pytest.mark.gpu
def test_a_recorded_step_gives_the_same_tokens(tmp_path: Path) -> None:
    made = export(shipped("fope"), tmp_path / "bundle", ExportConfig(dtype="fp16", cache="static"))
    made, _ = build(made, BuildConfig(target=LIBRARIES_HERE[0]))
    prompts, sampling = [[100, 101, 102], [32, 33]], SamplingParams(max_new_tokens=32)
    plain, recorded = (list(generate(TrtBackend(made, cuda_graph=graph), prompts, sampling)) for graph in (False, True))
    assert plain == recorded
