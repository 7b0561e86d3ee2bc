"""Bundles: whole or not at all, whatever happens while they are written."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fope_export import bundle as module
from fope_export.bundle import MANIFEST, Bundle, creating, sha256
from fope_export.errors import BundleError
from fope_export.graph import export as exporter
from fope_export.graph.export import export


def test_the_manifest_lists_every_file(bundle: Bundle) -> None:
    files = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    assert set(bundle.manifest.files) == files - {MANIFEST}
    assert all(sha256(bundle.path / name) == digest for name, digest in bundle.manifest.files.items())
    assert bundle.manifest.source.files.keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert len(bundle.manifest.spectra) == 2 and len(bundle.manifest.spectra[0]["freq"]) == 3


def change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "is not a bundle"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not a valid manifest"),
        (lambda folder: (folder / MANIFEST).write_text('{"format_version": 1}'), "not a valid manifest"),
        (lambda folder: (folder / MANIFEST).write_text('{"format_version": 9}'), "format version 9"),
        (lambda folder: change(folder / MANIFEST, '"num_kv_heads": 4', '"num_kv_heads": 3'), "cannot share"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "model.onnx.data: is missing"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json: differs from the hash"),
    ],
)
def test_what_is_not_a_bundle_is_refused(spoil: Callable[[Path], object], message: str, spoilable: Bundle) -> None:
    spoil(spoilable.path)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(spoilable.path)
    assert caught.value.hint


def test_files_join_and_replace(spoilable: Bundle) -> None:
    spoilable.add({"reports/a.json": b"1"}).add({"reports/a.json": b"2", "b": b"3"})
    again = Bundle.open(spoilable.path)
    assert (again.path / "reports/a.json").read_bytes() == b"2"
    assert {"reports/a.json", "b", "model.onnx"} <= set(again.manifest.files)


@pytest.mark.parametrize("writes", range(5))
def test_a_bundle_stays_valid_when_adding_is_cut_short(
    writes: int, spoilable: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilable.add({"reports/a.json": b"old", "reports/b.json": b"old"})
    real, left = module._write, [writes]

    def cut(path: Path, content: bytes) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, content)

    monkeypatch.setattr(module, "_write", cut)
    opened = Bundle.open(spoilable.path)
    if writes < 4:
        with pytest.raises(KeyboardInterrupt):
            opened.add({"reports/a.json": b"new", "reports/b.json": b"new"})
    else:
        opened.add({"reports/a.json": b"new", "reports/b.json": b"new"})
    Bundle.open(spoilable.path)


def write_half(out: Path, error: Exception | None = None) -> None:
    with creating(out) as folder:
        (folder / "model.onnx").write_bytes(b"half")
        if error:
            raise error


@pytest.mark.parametrize("error", [RuntimeError(), None], ids=["error", "no manifest"])
def test_what_is_not_finished_leaves_no_trace(error: Exception | None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError if error else BundleError):
        write_half(tmp_path / "out", error)
    assert not list(tmp_path.iterdir())


def test_a_bundle_may_be_replaced_and_other_folders_not(native: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(bundle.path, out)
    (out / "config.json").write_text("old")
    export(native, out)
    Bundle.open(out)
    (tmp_path / "other").mkdir()
    for folder in (out, tmp_path / "other"):
        (folder / "thesis.tex").write_text("years of work")
        with pytest.raises(BundleError, match="nothing was written"):
            export(native, folder)
        assert (folder / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_a_link_leads_to_the_bundle(native: Path, bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "real")
    (tmp_path / "real" / "config.json").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(native, tmp_path / "link")
    assert Bundle.open(tmp_path / "real") and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_a_rename_that_fails_brings_the_old_bundle_back(
    native: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bundle.path, tmp_path / "out"))
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        export(native, out)
    assert Bundle.open(out) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_reports_are_not_part_of_a_bundles_integrity(spoilable: Bundle) -> None:
    spoilable.add({"reports/a.json": b"1"})
    (spoilable.path / "reports/a.json").unlink()
    Bundle.open(spoilable.path)


def test_leftovers_of_dead_runs_are_swept_and_of_living_ones_not(native: Path, tmp_path: Path) -> None:
    dead, alive = tmp_path / ".out.4194305.partial", tmp_path / f".out.{os.getppid()}.partial"
    for folder in (dead, alive, tmp_path / ".outer.4194305.partial"):
        folder.mkdir()
    export(native, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, ".outer.4194305.partial"}


def _export(native: Path, out: Path, moment: str) -> None:
    """Export, and be killed at `moment`: the n-th call of a function."""
    if moment:
        name, count = moment.split()
        holder = {"complete": exporter, "_read_manifest": module, "rename": Path}[name]
        real, left = getattr(holder, name), [int(count)]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(holder, name, deadly)
    export(native, out)


@pytest.fixture(scope="module")
def server() -> Any:
    """Processes that start with everything imported, so that a kill falls into the export itself."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fope_export.graph.export", "tests.test_bundle"])
    return context


def killed(server: Any, native: Path, out: Path, moment: str) -> None:
    process = server.Process(target=_export, args=(native, out, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["complete 1", "_read_manifest 1", "rename 1"])
def test_a_kill_at_the_worst_moments_of_a_first_export(moment: str, server: Any, native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(server, native, out, moment)
    assert not out.exists()
    export(native, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and Bundle.open(out)


@pytest.mark.parametrize("moment", ["complete 1", "_read_manifest 3", "rename 1", "rename 2"])
def test_a_kill_at_the_worst_moments_of_replacing_a_bundle(
    moment: str, server: Any, native: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(bundle.path, tmp_path / "out"))
    before = out.stat().st_ino
    killed(server, native, out, moment)
    assert out.exists() == (moment != "rename 2")
    with pytest.raises(BundleError), creating(out):
        pass  # an export that fails early
    assert Bundle.open(out) and out.stat().st_ino == before
    export(native, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and Bundle.open(out)


def test_kill_9_at_20_random_moments(server: Any, native: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Whatever the moment: no half-written OUT, and the next export succeeds."""
    out = tmp_path / "out"
    started = time.perf_counter()
    whole = server.Process(target=_export, args=(native, out, ""))
    whole.start()
    whole.join(120)
    seconds = time.perf_counter() - started
    assert whole.exitcode == 0
    kills = 0
    for moment in random.Random(0).sample(range(100), 20):
        shutil.rmtree(out, ignore_errors=True)
        process = server.Process(target=_export, args=(native, out, ""))
        process.start()
        process.join(seconds * moment / 100)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert not out.exists() or Bundle.open(out).damaged() == {}
    assert kills > 10
    export(native, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert msgspec.structs.replace(Bundle.open(out).manifest) == bundle.manifest
