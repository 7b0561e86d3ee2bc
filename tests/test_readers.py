"""What reads, simplifies and runs ONNX files of any kind gives the portable file's logits, whole and with a cache."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from fope_export.backends.base import feeds_for
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph.export import export
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from tests.conftest import mixture, small_decoder, write_native
from tests.extensions import extended_decoder
from tests.support import same_function, tokens, truth_of

Outputs = Mapping[str, NDArray[Any]]
Step = Callable[[Outputs], Outputs]
"""Inputs to outputs, by name."""
MODELS: dict[str, Callable[[], Decoder]] = {
    "fope": small_decoder,
    "grouped": lambda: small_decoder(kv_heads=2),
    "experts": lambda: small_decoder(experts=mixture()),
    "general": lambda: extended_decoder(axes=3, bases=2),
}


def in_onnxruntime(model: Path | bytes) -> Step:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def in_reference(path: Path) -> Step:
    evaluator = ReferenceEvaluator(onnx.load(path))
    return lambda feeds: dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))


def in_openvino(path: Path) -> Step:
    openvino = pytest.importorskip("openvino", reason="needs fope-export[openvino]")
    core = openvino.Core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda feeds: {port.get_any_name(): array for port, array in model(dict(feeds)).items()}


def by_onnxslim(path: Path) -> Step:
    onnxslim = pytest.importorskip("onnxslim", reason="needs scripts/venv peers")
    return in_onnxruntime(onnxslim.slim(str(path)).SerializeToString())


def by_onnxsim(path: Path) -> Step:
    onnxsim = pytest.importorskip("onnxsim", reason="needs scripts/venv peers")
    simplified, same = onnxsim.simplify(onnx.load(path))
    assert same
    return in_onnxruntime(simplified.SerializeToString())


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_native(MODELS[request.param](), tmp_path_factory.mktemp("readers") / "checkpoint")


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> dict[str, Bundle]:
    """With the rotation as a function, and written out."""
    return {
        name: export(checkpoint, checkpoint.parent / name, ExportConfig(inline=name == "inlined"))
        for name in ("portable", "inlined")
    }


def logits(step: Step, bundle: Bundle, ids: NDArray[np.int64]) -> NDArray[Any]:
    """Of five tokens, and of the others after these."""
    config, parts = bundle.manifest.decoder(), []
    shape = (len(ids), config.num_kv_heads, 0, config.spectrum.head_dim)
    cache: Outputs = {
        port.name: np.zeros(shape, np.float32) for port in bundle.manifest.inputs if port.name.startswith("past")
    }
    whole = feeds_for(ids)
    for start, end in ((0, 5), (5, ids.shape[1])):
        out = step(
            {
                "input_ids": whole.input_ids[:, start:end], "attention_mask": whole.attention_mask[:, :end],
                "position_ids": whole.position_ids[:, start:end], **cache,
            }
        )  # fmt: skip
        cache = {name: out[name.replace("past_key_values", "present")] for name in cache}
        parts.append(out["logits"])
    return np.concatenate(parts, axis=1)


READERS = [
    (in_reference, "portable"),
    (in_reference, "inlined"),
    (by_onnxsim, "portable"),
    (by_onnxsim, "inlined"),
    (by_onnxslim, "inlined"),
    (in_openvino, "inlined"),
]


@pytest.mark.parametrize(("read", "file"), READERS, ids=[f"{read.__name__}, {file}" for read, file in READERS])
def test_a_reader_gives_our_logits(
    read: Callable[[Path], Step], file: str, bundles: dict[str, Bundle], checkpoint: Path
) -> None:
    bundle, ids, model = bundles[file], tokens(2, 9), load_checkpoint(checkpoint).model
    eager = EagerBackend(model)
    wanted, _ = eager.step(feeds_for(ids), eager.empty_cache(2))
    same_function(logits(read(bundle.model), bundle, ids), wanted, truth_of(model, ids))


@pytest.mark.parametrize("file", ["portable", "inlined"])
def test_checker_and_shape_inference_take_it(file: str, bundles: dict[str, Bundle]) -> None:
    path = bundles[file].model
    onnx.checker.check_model(path, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    assert known >= {name for node in inferred.graph.node for name in node.output}


@pytest.mark.parametrize(
    ("read", "said"),
    [(by_onnxslim, "constant_value has inconsistent type"), (in_openvino, "Attention-23")],
    ids=["onnxslim", "openvino"],
)
def test_who_wants_no_functions_says_so(read: Callable[[Path], Step], said: str, bundles: dict[str, Bundle]) -> None:
    """The rows of the documentation that ask for `--inline`: where this fails, they can be told without it."""
    with pytest.raises(Exception, match=said):
        read(bundles["portable"].model)
