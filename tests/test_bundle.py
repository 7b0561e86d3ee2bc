"""Bundles: whole or not at all, whatever happens while they are written."""

import errno
import fcntl
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fope_export import bundle as module
from fope_export import place
from fope_export.backends.choose import load_backend
from fope_export.backends.ort_optimized import OptimizedOrtBackend
from fope_export.bundle import Bundle, creating, sha256
from fope_export.errors import BundleError
from fope_export.graph import export as exporter
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.inspection import OnnxDescription, inspect
from fope_export.manifest import MANIFEST, OPTIMIZED


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


class Cut(BaseException):
    """In the place of a kill."""


def cut_at(monkeypatch: pytest.MonkeyPatch, holder: object, name: str, count: int) -> None:
    """End the program at the `count`-th call of a function from now on."""
    real, left = getattr(holder, name), [count]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise Cut
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, name, deadly)


@pytest.mark.parametrize("moves", range(8))
def test_adding_that_is_cut_short_is_undone_or_finished(
    moves: int, spoilable: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = spoilable.add({"reports/a.json": b"old", "config.json": b"old"})
    with monkeypatch.context() as patch, suppress(Cut):
        cut_at(patch, Path, "replace", moves)
        before.add({"reports/a.json": b"new", "config.json": b"new"})
    contents = {(spoilable.path / name).read_bytes() for name in ("config.json", "reports/a.json")}
    assert moves == 3 or len(contents) == 1
    opened = Bundle.open(spoilable.path)
    contents = {(spoilable.path / name).read_bytes() for name in ("config.json", "reports/a.json")}
    assert contents == {b"old" if moves == 0 else b"new"}
    assert {p.relative_to(opened.path).as_posix() for p in opened.path.rglob("*") if p.is_file()} == {
        *opened.manifest.files, MANIFEST,
    }  # fmt: skip


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


@pytest.mark.parametrize("error", [errno.EBUSY, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
def test_where_folders_cannot_be_exchanged_at_once(
    error: int, native: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bundle.path, tmp_path / "out"))
    change(out / "config.json", "{", "{ ")

    def refuse(*_: Path) -> bool:
        if error in place.UNKNOWN:
            return False
        raise OSError(error, "no")

    monkeypatch.setattr(place, "_exchanged", refuse)
    export(native, out)
    assert Bundle.open(out) and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {path.name for path in bundle.path.iterdir()}


def test_reports_are_not_part_of_a_bundles_integrity(spoilable: Bundle) -> None:
    spoilable.add({"reports/a.json": b"1"})
    (spoilable.path / "reports/a.json").unlink()
    Bundle.open(spoilable.path)


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_leftovers_of_dead_runs_are_swept(inside: bool, native: Path, spoilable: Bundle) -> None:
    out = spoilable.path
    folder = out / place.STAGED if inside else out.with_name(f".{out.name}.partial")
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"half")
    spoilable.add({"reports/a.json": b"1"})
    assert [path.name for path in out.parent.iterdir()] == [out.name] and not list(out.glob(f"{place.OURS}*"))


def test_a_living_writer_is_waited_for_and_named(
    native: Path, spoilable: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    out = spoilable.path
    with place.holding(out, 0, lambda folder: None):
        exporting = partial(export, native, out, lock_timeout=0.3)
        for write in (exporting, partial(spoilable.add, {"b": b""}, lock_timeout=0)):
            with pytest.raises(BundleError, match=rf"is being written by `.*` on .*{os.getpid()}.* since 20") as caught:
                write()
            assert "--lock-timeout" in caught.value.hint
        assert "waiting for `" in caplog.text
        Bundle.open(out)  # readers need no lock
    spoilable.add({"b": b""}, lock_timeout=0)


def test_two_first_exports_do_not_meet(native: Path, tmp_path: Path) -> None:
    writing = creating(tmp_path / "out")
    with pytest.raises(BundleError, match="is not a bundle"), writing, pytest.raises(BundleError, match="written by"):
        export(native, tmp_path / "out", lock_timeout=0)


def test_what_others_wrote_meanwhile_stays(native: Path, spoilable: Bundle, rope_bundle: Bundle) -> None:
    other = Bundle.open(spoilable.path)
    other.add({"reports/a.json": b"1"})
    assert {"reports/a.json", "reports/b.json"} <= set(spoilable.add({"reports/b.json": b"2"}).manifest.files)
    shutil.rmtree(spoilable.path)
    shutil.copytree(rope_bundle.path, spoilable.path)
    with pytest.raises(BundleError, match="was replaced by another export"):
        spoilable.add({"reports/b.json": b"2"})


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_refused(
    number: int, native: Path, spoilable: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BundleError, match=r"file system without locks \(\w+: "):
        export(native, spoilable.path)
    with pytest.raises(BundleError, match="file system without locks"):
        spoilable.add({"b": b""})
    assert not list(spoilable.path.glob(f"{place.OURS}*")) and len(list(spoilable.path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: [path.unlink() for path in folder.iterdir() if path.name != MANIFEST],
        lambda folder: (folder / "model.onnx.data").unlink(),
        lambda folder: change(folder / MANIFEST, '"model.onnx"', '"other"'),
        lambda folder: (folder / MANIFEST).write_text(
            re.sub(r'"files": {[^}]*}\n}', '"files": {}}', _manifest(folder))
        ),
        lambda folder: (folder / MANIFEST).write_text("{"),
    ],
    ids=["manifest alone", "weights gone", "no model", "lists nothing", "destroyed"],
)
def test_damaged_bundles_are_refused_and_can_be_exported_again(
    spoil: Callable[[Path], object], native: Path, spoilable: Bundle
) -> None:
    spoil(spoilable.path)
    with pytest.raises(BundleError):
        Bundle.open(spoilable.path, verify=False)
    export(native, spoilable.path)
    Bundle.open(spoilable.path)


def _manifest(folder: Path) -> str:
    return (folder / MANIFEST).read_text()


def test_the_current_folder_stays_the_bundle(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.chdir(out)
    for _ in range(2):
        export(native, Path())
    assert Bundle.open(out) and out.stat().st_ino == inode and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_are_followed_and_never_written_through(spoilable: Bundle, tmp_path: Path) -> None:
    """Hugging Face's hub cache: files are links to blobs with other names."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(spoilable.path.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    assert load_backend(spoilable).vocab_size == 256
    assert isinstance(inspect(spoilable.path / "model.onnx"), OnnxDescription)
    made = optimize(Bundle.open(spoilable.path))
    assert not (made.path / OPTIMIZED).is_symlink() and not (made.path / MANIFEST).is_symlink()
    assert OptimizedOrtBackend(Bundle.open(made.path)).vocab_size == 256
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    (made.path / "reports").symlink_to(blobs)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        made.add({"reports/0": b"through"})
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


def _export(native: Path, out: Path, moment: str) -> None:
    """Export, and be killed at `moment`: the n-th call of a function."""
    if moment:
        name, count = moment.split()
        holder = {"finish_manifest": exporter, "read_manifest": module, "_exchange": place, "_clear": place}[name]
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


@pytest.mark.parametrize("moment", ["finish_manifest 1", "read_manifest 1", "_exchange 1"])
def test_a_kill_at_the_worst_moments_of_a_first_export(moment: str, server: Any, native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(server, native, out, moment)
    assert not out.exists()
    export(native, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and Bundle.open(out)


@pytest.mark.parametrize("moment", ["finish_manifest 1", "read_manifest 1", "_exchange 1", "_clear 2"])
def test_a_kill_at_the_worst_moments_of_replacing_a_bundle(
    moment: str, server: Any, native: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(bundle.path, tmp_path / "out"))
    before = out.stat().st_ino
    killed(server, native, out, moment)
    assert Bundle.open(out) and (out.stat().st_ino == before) == (moment != "_clear 2")
    with pytest.raises(BundleError), creating(out):
        pass  # an export that fails early
    assert Bundle.open(out) and [path.name for path in tmp_path.iterdir()] == ["out"]
    export(native, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and Bundle.open(out)


@pytest.mark.whole
def test_kill_9_at_20_random_moments(server: Any, native: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Whatever the moment: no half-written OUT, and the next export succeeds."""
    out, seconds, kills = tmp_path / "out", 120.0, 0
    for moment in (100, *random.Random(0).sample(range(100), 20)):
        shutil.rmtree(out, ignore_errors=True)
        started, process = time.perf_counter(), server.Process(target=_export, args=(native, out, ""))
        process.start()
        process.join(seconds * moment / 100)
        process.kill()
        process.join()
        if process.exitcode == 0:  # the fastest whole export says what the moments are parts of
            seconds = min(seconds, time.perf_counter() - started)
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        assert not out.exists() or Bundle.open(out).damaged() == {}
    assert seconds < 120
    assert kills > 10
    export(native, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert msgspec.structs.replace(Bundle.open(out).manifest) == bundle.manifest


def test_swapped_arguments_are_told_apart_from_a_folder_in_the_way(native: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="would be lost") as caught:
        export(native, native)
    assert "CKPT OUT" in caught.value.hint and "remove" not in caught.value.hint


def test_what_a_new_export_drops_is_said(native: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    optimize(export(native, out))
    export(native, out)
    told = [record.message for record in caplog.records if record.name == module.__name__]
    assert told == [f"{out} is replaced, and what was added to it is gone: model.ort.onnx"]
