"""Every backend keeps the protocol's promises."""

import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fope_export.backends.base import Backend, feeds_for
from fope_export.backends.choose import BACKENDS, load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import read_machine
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.dtypes import DTYPES
from fope_export.errors import BackendError, BundleError, install, require
from fope_export.graph.export import export
from fope_export.graph.optimize import OPENVINO, optimize
from fope_export.manifest import plain_file
from fope_export.model.checkpoint import source_of
from fope_export.model.decoder import Decoder
from tests.support import same_function, tokens, truth_of

HERE = [
    (name, variant.name)
    for name, row in BACKENDS.items()
    if not row.missing(read_machine())
    for variant in row.variants
    if not variant.rounds
]
"""Every way in which this machine runs them, as far as one is there: a GPU's attention takes half types alone."""


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def made(request: pytest.FixtureRequest, native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With all that is optimized for a machine like this one."""
    made = optimize(export(native, tmp_path_factory.mktemp("made") / "out", ExportConfig(dtype=request.param)))
    return optimize(made, OPENVINO) if OPENVINO in read_machine().packages else made


@pytest.fixture
def exported(made: Bundle) -> Decoder:
    """The decoder that it holds."""
    return source_of(made).model.converted(made.manifest.export)


@pytest.fixture(params=HERE, ids=", ".join)
def backend(request: pytest.FixtureRequest, made: Bundle) -> Backend:
    name, variant = request.param
    if variant not in [each.name for each in BACKENDS[name].variants_of(made)]:
        pytest.skip(f"{name} takes no bundle in {made.manifest.export.dtype} without an engine")
    return load_backend(made, name, variant=variant)


def test_steps_grow_a_cache_that_stays_valid(backend: Backend, exported: Decoder) -> None:
    ids = tokens(2, 8)
    truth = truth_of(exported, ids)
    whole, _ = backend.step(feeds_for(ids), backend.empty_cache(2))
    assert whole.shape == (2, 8, backend.vocab_size)
    _, past = backend.step(feeds_for(ids[:, :6]), backend.empty_cache(2))
    mask = np.ones((2, 8), np.int64)
    for _ in range(2):  # the same past, twice
        logits, _ = backend.step(feeds_for(ids[:, 6:], mask), past)
        same_function(logits, whole[:, 6:], truth[:, 6:])


def test_logits_belong_to_the_caller(backend: Backend) -> None:
    first, _ = backend.step(feeds_for(tokens(1, 4)), backend.empty_cache(1))
    kept = first.copy()
    backend.step(feeds_for(tokens(1, 4) + 1 - tokens(1, 4) // 255), backend.empty_cache(1))
    np.testing.assert_array_equal(first, kept)


def test_backends_agree(made: Bundle, exported: Decoder) -> None:
    """Each with each other that computes in the same dtype, and with PyTorch on the weights that were exported."""
    ids, own = tokens(3, 70), DTYPES[made.manifest.export.dtype].precision
    running: list[tuple[str, Backend]] = [(own, EagerBackend(exported))]
    for name, variant in HERE:
        if name != "torch" and variant in [each.name for each in BACKENDS[name].variants_of(made)]:
            running.append((BACKENDS[name].arithmetic(made), load_backend(made, name, variant=variant)))
    truth = truth_of(exported, ids)
    results = [(dtype, each.step(feeds_for(ids), each.empty_cache(3))[0]) for dtype, each in running]
    alike = [(one, other) for (of, one), (too, other) in combinations(results, 2) if of == too]
    assert len(alike) >= 3
    for one, other in alike:
        same_function(one, other, truth)


def test_feeds_count_positions_from_the_first_token() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    feeds = feeds_for(np.zeros((2, 3), np.int64), mask)
    assert feeds.position_ids.tolist() == [[0, 1, 2], [2, 3, 4]]


def test_a_graph_that_does_not_load_is_named(spoilable: Bundle) -> None:
    spoilable.model.write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"model\.onnx") as caught:
        load_backend(spoilable, "onnxruntime")
    assert caught.value.hint


def test_a_bundle_without_its_plain_file_is_told_apart(native: Path, tmp_path: Path) -> None:
    """As an earlier version exported them."""
    made = export(native, tmp_path / "out", ExportConfig(dtype="bf16"))
    plain = plain_file(made.manifest.export)
    old = {name: digest for name, digest in made.manifest.files.items() if name != plain}
    bundle = replace(made, manifest=msgspec.structs.replace(made.manifest, files=old))
    with pytest.raises(BackendError, match=r"an earlier version, which wrote no model\.float32\.onnx for .* bf16"):
        load_backend(bundle)


def test_the_torch_backend_needs_the_checkpoint(native: Path, bundle: Bundle, tmp_path: Path) -> None:
    moved = export(shutil.copytree(native, tmp_path / "checkpoint"), tmp_path / "out")
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(BundleError, match="its checkpoint is not at"):
        load_backend(moved, "torch")


def test_a_missing_library_turns_into_advice() -> None:
    with pytest.raises(BackendError, match="no_such_library is not installed") as caught:
        require("no_such_library", "cpu")
    assert caught.value.hint == install("cpu")


def test_a_broken_library_shows_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import its_missing_part")
    (tmp_path / "unlinked.py").write_text("raise OSError('libx.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match="broken: No module named 'its_missing_part'"):
        require("half_installed", "cpu")
    with pytest.raises(BackendError, match=r"does not load: libx\.so"):
        require("unlinked", "cpu")
