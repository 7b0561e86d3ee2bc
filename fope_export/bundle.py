"""The folder that one stage writes and the next reads: a manifest with hashes, written whole or not at all."""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from fope_export import place
from fope_export.errors import BundleError, cut
from fope_export.links import loadable
from fope_export.lock import TIMEOUT
from fope_export.manifest import MANIFEST, MODEL, REPORTS, Manifest, read_manifest, weights_file

log = logging.getLogger(__name__)

WEIGHTS = re.compile(r"\.(safetensors|pt|bin|index\.json)$")
"""Files by which a checkpoint is told."""
MADE = re.compile(
    r"model(\.cpu|\.ort|\.float32)?\.onnx(\.data)?|genai_config\.json|reports/(parity|bench|stages|evaluation)\.(json|html|xml)"
    r"|onnx/model\.onnx(_data)?|engines/[^/]+\.(plan|json)|openvino/\w+\.(xml|bin|json|jinja)"
)
"""Files that only this program makes, and that it makes again."""
COPIED = re.compile(
    r"(config|generation_config|\w*token\w*|vocab)\.json|merges\.txt|tokenizer\.model|chat_template\.jinja"
)
"""Other files of bundles, by which one is told whose manifest is destroyed."""
PAUSE, READS = 0.1, 50
"""Seconds between two readings while a writer puts files in their places, and how many there are."""


@dataclass(frozen=True)
class Bundle:
    """A folder with an exported model, at `path`, and its valid `manifest`, which says what the model is and has the
    SHA-256 of every file. It is used as a path, too.

    >>> import fope_export as fx
    >>> bundle = fx.Bundle.open("out")
    >>> bundle.model.name, bundle.manifest.export.opset
    ('model.onnx', 23)
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Self:
        """Read the bundle in folder `path`. Every file that its manifest lists must be there; with `verify`, each must
        have the hash that is recorded, too. What a writer that was killed has left is finished or removed first, where
        that can be done.

        Raises BundleError with the folder or file that is wrong.
        """
        folder = Path(path)
        place.repair(folder, _settle)
        for _ in range(READS):
            before = _stamp(folder)
            try:
                return cls._read(folder, verify=verify)
            except BundleError:
                if before == _stamp(folder) and not place.committing(folder):
                    raise
            time.sleep(PAUSE)
        return cls._read(folder, verify=verify)

    @classmethod
    def of(cls, bundle: "str | Path | Bundle", *, verify: bool = False) -> "Bundle":
        """`bundle` itself where it is one already, else the one in that folder, which is opened with `verify`: so that
        functions take either. Raises BundleError as `open` does.
        """
        return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def _read(cls, folder: Path, *, verify: bool) -> Self:
        bundle = cls(folder, read_manifest(folder))
        _check_whole(folder, bundle.manifest)
        if verify and (damaged := bundle.damaged()):
            name, reason = next(iter(damaged.items()))
            raise BundleError(
                f"{folder / name}: {reason}",
                hint="Export the checkpoint again; `fope-export validate` shows what the change did.",
            )
        return bundle

    @property
    def model(self) -> Path:
        """The path of the portable ONNX file; where that is a symbolic link, which libraries refuse, of a copy."""
        return self.loadable(MODEL)

    def loadable(self, name: str) -> Path:
        """The path of the ONNX file `name`, to load it from; as for `model`."""
        return loadable(self.path / name, weights_file(self.manifest.export))

    def damaged(self) -> dict[str, str]:
        """Names of files that are gone, or no longer have the hash in the manifest, each with the reason. Reports are
        left out, because they can be made again at any time, and so is what another command has replaced and recorded
        since this bundle was opened.
        """
        reasons = _damaged(self.path, self.manifest)
        if reasons and (now := read_manifest(self.path)) != self.manifest:
            still = _damaged(self.path, now)
            reasons = {name: why for name, why in reasons.items() if name in still}
        return reasons

    def add(self, files: Mapping[str, bytes | Path], *, lock_timeout: float = TIMEOUT) -> Self:
        """Add or replace files, and give the bundle that has them. `files` has by name the content of each, or a path
        from which it is moved here. Interrupted anywhere, the bundle is as before, or the next command finishes the
        work. Another writer is waited for, `lock_timeout` seconds, and what it wrote stays.

        Raises BundleError where another model was exported to this folder meanwhile, or where the writer does not come
        to an end; OSError where the folder cannot be written to.
        """
        with self.changing(lock_timeout) as now:
            if _identity(now.manifest) != _identity(self.manifest):
                raise BundleError(
                    f"{self.path} was replaced by another export meanwhile; {', '.join(files)} would not belong to it",
                    hint="Run the command again, on what is there now.",
                )
            return now.put(files)

    @contextmanager
    def changing(self, lock_timeout: float = TIMEOUT) -> Iterator[Self]:
        """Be the only writer of this bundle within a `with` block, which is given the bundle as it is now, for `put`.
        Another writer is waited for, `lock_timeout` seconds.

        Raises BundleError where that one does not come to an end, and where another model was exported to this folder
        and its files do not have the hashes that its manifest records.
        """
        with place.holding(self.path, lock_timeout, _settle):
            now = type(self)(self.path, read_manifest(self.path))
            if now.manifest.files != self.manifest.files and _identity(now.manifest) != _identity(self.manifest):
                now = type(self)._read(self.path, verify=True)
            yield now

    def put(
        self,
        files: Mapping[str, bytes | Path],
        *,
        without: Collection[str] = (),
        cache: str | msgspec.UnsetType | None = None,
    ) -> Self:
        """Add or replace `files` as `add` does, inside a block of `changing`, which gives the bundle that this is
        called on. The files named in `without` are removed, where they exist; `cache` is what its manifest says from
        now on (None: what it said).
        """
        staged = self.path / place.STAGED
        staged.mkdir()
        for name, content in files.items():
            _stage(staged / name, content)
        added = {name: sha256(staged / name) for name in files}
        kept = {name: digest for name, digest in self.manifest.files.items() if name not in without}
        manifest = msgspec.structs.replace(
            self.manifest,
            files=dict(sorted((kept | added).items())),
            cache=self.manifest.cache if cache is None else cache,
        )
        _write_manifest(staged, manifest)
        place.flush(staged)
        place.commit(self.path, _settle)
        return type(self)(self.path, manifest)


def _damaged(folder: Path, manifest: Manifest) -> dict[str, str]:
    reasons = {}
    for name, recorded in manifest.files.items():
        if name.startswith(REPORTS):
            continue
        if not (folder / name).is_file():
            reasons[name] = "is missing"
        elif sha256(folder / name) != recorded:
            reasons[name] = "differs from the hash in the manifest"
    return reasons


def _identity(manifest: Manifest) -> Manifest:
    """What is no longer the same when another model was exported to the same place."""
    portable = {
        name: digest for name, digest in manifest.files.items() if name in (MODEL, weights_file(manifest.export))
    }
    return msgspec.structs.replace(manifest, files=portable, cache=msgspec.UNSET)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes when a writer puts another manifest in place."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns


def _check_whole(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError where a manifest describes files that are not there, or none."""
    missing = [name for name in manifest.files if not name.startswith(REPORTS) and not (folder / name).is_file()]
    if missing or MODEL not in manifest.files:
        told = f"{folder / missing[0]}: is missing" if missing else f"{folder / MANIFEST}: lists no {MODEL}"
        raise BundleError(f"not a whole bundle: {told}", hint="Export the checkpoint again.")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def creating(out: Path, *, lock_timeout: float = TIMEOUT) -> Iterator[Path]:
    """A folder to write a bundle into; it becomes `out` when the block ends with a manifest in it. Another writer of
    `out` is waited for, for `lock_timeout` seconds.

    It lies beside `out` and takes its place in one step. Where `out` itself must stay (something is mounted there, this
    process stands in it, or nothing can be written beside it), it lies inside, and its files are moved.

    An error leaves `out` as it was, and so does a kill; where one falls between moving two files, the next command
    moves the others. Raises BundleError when `out` is not free for a bundle.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with place.preparing(out, lock_timeout, _settle) as work:
        check_target(out)
        yield work
        _check_whole(work, manifest := read_manifest(work))
        lost = sorted(_listed(out) - {*manifest.files, MANIFEST})
        place.put(work, out, _settle)
        if lost:
            log.warning("%s is replaced, and what was added to it is gone: %s", out, cut(", ".join(lost)))


def check_target(out: Path) -> None:
    """Raises BundleError unless `out` is free, a folder without files, or a bundle, whole or damaged, with nothing else
    in it.
    """
    if not out.exists():
        return
    present = _files_in(out) if out.is_dir() else ["."]
    if present and MANIFEST not in present:
        raise BundleError(
            f"{out} exists and would be lost; nothing was written: it has no {MANIFEST}",
            hint="It looks like a checkpoint, which comes first: export CKPT OUT. Choose a new folder for OUT."
            if any(WEIGHTS.search(name) for name in present)
            else "Choose another folder, or remove it.",
        )
    known = _listed(out)
    others = [name for name in present if name not in known | {MANIFEST} and not Path(name).name.startswith(".")]
    if others := [name for name in others if not (MADE.fullmatch(name) or (not known and COPIED.fullmatch(name)))]:
        raise BundleError(
            f"{out} holds {others[0]}, which is not the bundle's and would be lost; nothing was written",
            hint="Move it away, or choose another folder.",
        )


def _files_in(folder: Path) -> list[str]:
    """Files in a folder, but for those of a writer."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return [path.as_posix() for path in paths if not path.parts[0].startswith(place.OURS)]


def _listed(folder: Path) -> set[str]:
    """What a manifest lists and its own name, also where it is damaged; nothing where nothing can be read from it."""
    try:
        files = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=dict[str, Any])["files"]
        return {str(name) for name in files} | {MANIFEST} if files else set()
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, RecursionError):
        return set()


def finish_manifest(folder: Path, manifest: Manifest, known: Mapping[str, str] = {}) -> Manifest:
    """Write `manifest` with the hashes of all files of `folder`, of which some are `known`: a bundle's last write."""
    names = [name for name in _files_in(folder) if name != MANIFEST]
    files = {name: known.get(name) or sha256(folder / name) for name in names}
    manifest = msgspec.structs.replace(manifest, files=files)
    _write_manifest(folder, manifest)
    return manifest


def _settle(folder: Path) -> None:
    """Move what a writer has committed to its place: `place.Settle` for bundles. Until the last step, the manifest, no
    file is listed that is not there, whole.
    """
    staged = folder / place.COMMITTED
    names = [name for name in _files_in(staged) if name != MANIFEST]
    if (staged / MANIFEST).is_file():
        new, old = _listed(staged), _listed(folder)
        for name in old - new:
            _drop(folder, name)
        if old:
            _keep_listed(folder, new - set(names))
        for name in names:
            target = _inside(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (staged / name).replace(target)
            place.flush_folder(target.parent)
        place.flush_folder(folder)
        (staged / MANIFEST).replace(folder / MANIFEST)
        place.flush_folder(folder)
    shutil.rmtree(staged, ignore_errors=True)


def _keep_listed(folder: Path, names: set[str]) -> None:
    """Leave only these names in a manifest, as long as their files are all that is sure."""
    try:
        manifest = read_manifest(folder)
    except BundleError:
        return
    kept = {name: digest for name, digest in manifest.files.items() if name in names}
    _write_manifest(folder, msgspec.structs.replace(manifest, files=kept))


def _drop(folder: Path, name: str) -> None:
    """Remove a file that a manifest lists, unless the name leads out of the folder."""
    with suppress(BundleError, OSError):
        _inside(folder, name).unlink()


def _inside(folder: Path, name: str) -> Path:
    """The path of a bundle's file. Raises BundleError where writing there would write elsewhere."""
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()) or ".." in Path(name).parts:
        raise BundleError(f"{path} leads out of the bundle", hint="Copy the bundle without links between folders.")
    return path


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace it in one step."""
    partial = folder / f"{place.OURS}manifest"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)


def _stage(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.move(content, path)
    else:
        path.write_bytes(content)
