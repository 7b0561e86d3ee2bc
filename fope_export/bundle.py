"""The folder that one stage writes and the next reads: a manifest with hashes, written whole or not at all."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Self

import msgspec

from fope_export import place
from fope_export.config import Count, ExportConfig, ModelConfig, Size, SpectrumConfig
from fope_export.documents import as_record, read_object
from fope_export.errors import BundleError, ConfigError, DocumentError, cut
from fope_export.links import loadable
from fope_export.lock import TIMEOUT

MANIFEST = "fope_export.json"
MODEL = "model.onnx"
OPTIMISED = "model.cpu.onnx"
"""The same model for ONNX Runtime alone; its weights are those of the first."""
KEPT = "logits_to_keep"
"""Its input, int64 [kept]: the new tokens whose logits are wanted, counted from each row's end. Who does not give it
gets those of the last, -1.
"""
REPORTS, ENGINES = "reports/", "engines/"
MADE = re.compile(
    r"model(\.cpu)?\.onnx(\.data)?|genai_config\.json|reports/(parity|bench)\.(json|html|xml)|engines/[^/]+\.(plan|json)"
)
"""Files that only this program makes, and that it makes again."""
COPIED = re.compile(
    r"(config|generation_config|\w*token\w*|vocab)\.json|merges\.txt|tokenizer\.model|chat_template\.jinja"
)
"""Other files of bundles, by which one is told whose manifest is destroyed."""
PAUSE, READS = 0.1, 50
"""Seconds between two readings while a writer puts files in their places, and how many there are."""
FORMAT_VERSION = 1
AGAIN = "Export the checkpoint again."
DTYPES = frozenset(
    "float float16 bfloat16 double int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128".split()
)
"""Element types of inputs and outputs."""
Name = Annotated[str, msgspec.Meta(min_length=1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""SHA-256 in hexadecimal."""
TERM = re.compile(r"([+-]?) ?(?:(\d+)\*)?(\w+)")
"""Symbolic sizes of inputs are sums of such terms: rows, 16*rows, past + sequence, length - 1."""
SUM = re.compile(rf"(?:{TERM.pattern} ?)+".replace("(\\d+)", "\\d{1,9}"))


class Port(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input or output of the graph; named sizes are symbolic."""

    name: Name
    dtype: str
    shape: list[Size | Name]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"{cut(self.name)} has the unknown dtype {cut(self.dtype)}", hint=AGAIN)

    def names(self) -> set[str]:
        """The symbolic sizes that its shape is made of. Raises ConfigError where a size is no sum of terms."""
        found = set()
        for size in (size for size in self.shape if isinstance(size, str)):
            if not SUM.fullmatch(size):
                raise ConfigError(f"{cut(self.name)} has the size {cut(size)}, expected a sum as past + 1", hint=AGAIN)
            found |= {name for _, _, name in TERM.findall(size) if not name.isdigit()}
        return found

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the symbolic sizes have these values."""
        return tuple(size if isinstance(size, int) else _value(size, sizes) for size in self.shape)


def _value(size: str, sizes: Mapping[str, int]) -> int:
    terms = (match.groups() for match in TERM.finditer(size))
    return sum(int(f"{sign}{factor or 1}") * (int(x) if x.isdigit() else sizes[x]) for sign, factor, x in terms)


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The checkpoint that a bundle was made from: `files` are SHA-256 by name. Of a module: its class, and the SHA-256
    of its `state_dict`.
    """

    path: str
    dialect: str
    files: dict[Name, Digest]


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """The values of a symbolic size that the graph was traced for, from `least` to `most` (None: no end), and the
    example's.
    """

    least: Size
    example: Size
    most: Size | None

    def __post_init__(self) -> None:
        if not self.least <= self.example <= (self.example if self.most is None else self.most):
            raise ConfigError(f"{self.example} is not from {self.least} to {self.most}", hint=AGAIN)


class ModuleRecord(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="model_type", tag="module"
):
    """What a bundle holds where it was made from a module and not from a decoder's checkpoint."""

    arguments: list[str]  # of the module's forward, in the order of the graph's inputs
    sizes: dict[str, Extent]  # by symbolic name
    values: dict[str, tuple[float, float]]  # smallest and largest of each input's example
    rotations: dict[str, SpectrumConfig]  # constants of each FopeRotary, by the module's path
    calls: Count  # of FopeRotary in the graph; one that is used twice makes two

    def __post_init__(self) -> None:
        if not self.rotations:
            raise ConfigError("the module has no rotation", hint=AGAIN)
        for name, (least, most) in self.values.items():
            if not least <= most:
                raise ConfigError(f"the values of {cut(name)} go from {least} to {most}", hint=AGAIN)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `fope_export.json` says. `files` are the SHA-256 of every other file, by path inside the bundle."""

    format_version: int
    tool_version: str
    libraries: dict[str, str]
    source: Source
    model: ModelConfig | ModuleRecord
    spectra: list[dict[str, list[float] | Digest]]
    """One a layer: `freq`, and the SHA-256 of the coefficients; `model.spectrum` (a module's `rotations`) has the
    constants.
    """
    export: ExportConfig
    inputs: list[Port]
    outputs: list[Port]
    files: dict[Name, Digest] = {}

    def __post_init__(self) -> None:
        """Raises ConfigError where the parts contradict each other, or where a file lies outside of the folder."""
        for name in self.files:
            if not _stays(name):
                raise ConfigError(f"files has {cut(name)}, which is no file of the folder", hint=AGAIN)
        if self.export.opset is None:
            raise ConfigError("export.opset is missing", hint=AGAIN)
        self._check_spectra()
        self._check_ports()

    def _check_spectra(self) -> None:
        if isinstance(self.model, ModelConfig):
            configs = [self.model.spectrum] * self.model.num_layers
        else:
            configs = list(self.model.rotations.values())
        freqs = [each["freq"] if each.keys() == SPECTRUM else None for each in self.spectra]
        found = [len(freq) if isinstance(freq, list) else None for freq in freqs]
        if found != (wanted := [config.frequencies for config in configs]):
            raise ConfigError(f"spectra has {cut(found)} frequencies, expected {cut(wanted)}", hint=AGAIN)

    def _check_ports(self) -> None:
        model = self.model
        sizes = set(model.sizes if isinstance(model, ModuleRecord) else SIZES)
        for port in self.inputs:
            if unknown := port.names() - sizes:
                raise ConfigError(f"{cut(port.name)} has the unknown size {cut(min(unknown))}", hint=AGAIN)
        if isinstance(model, ModuleRecord):
            _compare("inputs", self.inputs, dict.fromkeys(model.values))
            _compare("outputs", self.outputs, {port.name: None for port in self.outputs})
        else:
            _compare("inputs", self.inputs, decoder_inputs(model, self.export))
            _compare("outputs", self.outputs, decoder_outputs(model, self.export))

    def decoder(self) -> ModelConfig:
        """The decoder that the bundle holds. Raises BundleError where it holds another module."""
        if isinstance(self.model, ModelConfig):
            return self.model
        raise BundleError(
            f"the bundle holds a module, {self.source.path}, and this needs a decoder exported from a checkpoint",
            hint="validate_module(bundle, module) compares it; any ONNX runtime runs its model.onnx.",
        )

    def module(self) -> ModuleRecord:
        """The module that the bundle holds. Raises BundleError where it holds a decoder."""
        if isinstance(self.model, ModuleRecord):
            return self.model
        raise BundleError(
            f"the bundle holds the decoder of {self.source.path}, and this needs a module's",
            hint="Compare it with `fope-export validate`.",
        )


SPECTRUM = {"freq", "sin_coef_sha256", "cos_coef_sha256"}
ELEMENTS = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
SIZES = ("batch", "sequence", "past_sequence", "total_sequence")
"""Symbolic sizes of a decoder's inputs."""


def decoder_inputs(model: ModelConfig, export: ExportConfig) -> dict[str, Port]:
    """The inputs that a decoder's graph has, by name: the new tokens, and the cache of each layer."""
    batch, sequence, past, total = SIZES
    tokens: dict[str, list[int | str]] = {
        "input_ids": [batch, sequence],
        "attention_mask": [batch, total],
        "position_ids": [batch, sequence],
    }
    dtype = ELEMENTS[export.dtype]
    room = export.capacity if export.cache == "static" else past
    if room is None:
        raise ConfigError("a static cache without a capacity", hint=AGAIN)
    cache: list[int | str] = [batch, model.num_kv_heads, room, model.spectrum.head_dim]
    names = (f"past_key_values.{i}.{part}" for i in range(model.num_layers) for part in ("key", "value"))
    ports = [Port(name=name, dtype="int64", shape=shape) for name, shape in tokens.items()]
    return {port.name: port for port in (*ports, *(Port(name=name, dtype=dtype, shape=cache) for name in names))}


def decoder_outputs(model: ModelConfig, export: ExportConfig) -> dict[str, Port | None]:
    """Its outputs by name, the cache's without what is said of them."""
    logits = Port(name="logits", dtype=ELEMENTS[export.dtype], shape=[*SIZES[:2], model.vocab_size])
    names = (f"present.{i}.{part}" for i in range(model.num_layers) for part in ("key", "value"))
    return {"logits": logits, **dict.fromkeys(names)}


def _compare(what: str, ports: list[Port], wanted: Mapping[str, Port | None]) -> None:
    """Raises ConfigError unless `ports` are those that are wanted, each once."""
    found = {port.name: port for port in ports}
    if not ports or len(found) < len(ports) or found.keys() != wanted.keys():
        different = sorted(found.keys() ^ wanted.keys()) or [*found, "any"]
        raise ConfigError(f"{what} has or lacks {cut(different[0])}", hint=AGAIN)
    for name, expected in wanted.items():
        if expected is not None and expected != found[name]:
            raise ConfigError(f"{what} has {cut(found[name])}, expected {expected}", hint=AGAIN)


def _stays(name: str) -> bool:
    """Whether a file of this name lies inside of the bundle's folder, on any system."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    anchor = PurePosixPath(name).anchor or PureWindowsPath(name).anchor
    return not anchor and ".." not in parts and "\0" not in name and name != MANIFEST


@dataclass(frozen=True)
class Bundle:
    """A folder with a valid manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Self:
        """Read the bundle in folder `path`, of which every file must be there; `verify` also compares them with their
        hashes. What a killed writer left is finished or removed first, where that can be done.

        Raises BundleError naming the folder or file, and what to do.
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
    def _read(cls, folder: Path, *, verify: bool) -> Self:
        bundle = cls(folder, _read_manifest(folder))
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
        """The portable file, or a copy of its name where that is a link, which libraries refuse."""
        return self.loadable(MODEL)

    def loadable(self, name: str) -> Path:
        """The ONNX file `name` as libraries load it."""
        return loadable(self.path / name, f"{MODEL}.data")

    def damaged(self) -> dict[str, str]:
        """Files that are gone or no longer what the manifest records, with the reason. Reports, which can be made again
        at any time, are not among them.
        """
        found = {}
        for name, recorded in self.manifest.files.items():
            if name.startswith(REPORTS):
                continue
            if not (self.path / name).is_file():
                found[name] = "is missing"
            elif sha256(self.path / name) != recorded:
                found[name] = "differs from the hash in the manifest"
        return found

    def add(self, files: Mapping[str, bytes | Path], *, lock_timeout: float = TIMEOUT) -> Self:
        """Add or replace files, of some content or moved from a path; interrupted anywhere, the bundle is as before or
        the next command finishes it. Another writer is waited for, and what it wrote stays.

        Raises BundleError where this is another model's bundle by now, and OSError where it cannot be written.
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
        """Be the only writer of this bundle; what is given is the bundle as it is now, for `put`.

        Raises BundleError, also where files are no longer what a newer manifest says.
        """
        with place.holding(self.path, lock_timeout, _settle):
            now = type(self)(self.path, _read_manifest(self.path))
            if now.manifest.files != self.manifest.files and _identity(now.manifest) != _identity(self.manifest):
                now = type(self)._read(self.path, verify=True)
            yield now

    def put(self, files: Mapping[str, bytes | Path]) -> Self:
        """`add` for who holds the lock, and has the bundle as it is now."""
        staged = self.path / place.STAGED
        staged.mkdir()
        for name, content in files.items():
            _stage(staged / name, content)
        added = {name: sha256(staged / name) for name in files}
        manifest = msgspec.structs.replace(self.manifest, files=dict(sorted((self.manifest.files | added).items())))
        _write_manifest(staged, manifest)
        place.flush(staged)
        place.commit(self.path, _settle)
        return type(self)(self.path, manifest)


def _identity(manifest: Manifest) -> Manifest:
    """What is no longer the same when another model was exported to the same place."""
    portable = {name: digest for name, digest in manifest.files.items() if name in (MODEL, f"{MODEL}.data")}
    return msgspec.structs.replace(manifest, files=portable)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes when a writer puts another manifest in place."""
    try:
        found = (folder / MANIFEST).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns


def _check_whole(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError where a manifest describes files that are not there, or none."""
    missing = [name for name in manifest.files if not name.startswith(REPORTS) and not (folder / name).is_file()]
    if missing or MODEL not in manifest.files:
        told = f"{folder / missing[0]}: is missing" if missing else f"{folder / MANIFEST}: lists no {MODEL}"
        raise BundleError(f"not a whole bundle: {told}", hint="Export the checkpoint again.")


def judged_files(manifest: Manifest) -> dict[str, str]:
    """The hashes of the files that a parity report is about: all but reports and engines, which come later."""
    return {name: digest for name, digest in manifest.files.items() if not name.startswith((REPORTS, ENGINES))}


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
        _check_whole(work, _read_manifest(work))
        place.put(work, out, _settle)


def check_target(out: Path) -> None:
    """Raises BundleError unless `out` is free, a folder without files, or a bundle, whole or damaged, with nothing else
    in it.
    """
    if not out.exists():
        return
    found = _found(out) if out.is_dir() else ["."]
    if found and MANIFEST not in found:
        raise BundleError(
            f"{out} exists and would be lost; nothing was written: it has no {MANIFEST}",
            hint="Choose another folder, or remove it.",
        )
    known = _listed(out)
    others = [name for name in found if name not in known and not Path(name).name.startswith(".")]
    if others := [name for name in others if not (MADE.fullmatch(name) or (not known and COPIED.fullmatch(name)))]:
        raise BundleError(
            f"{out} holds {others[0]}, which is not the bundle's and would be lost; nothing was written",
            hint="Move it away, or choose another folder.",
        )


def _found(folder: Path) -> list[str]:
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


def complete(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest` with the hashes of all files of `folder`: the last write of a bundle."""
    names = [name for name in _found(folder) if name != MANIFEST]
    manifest = msgspec.structs.replace(manifest, files={name: sha256(folder / name) for name in names})
    _write_manifest(folder, manifest)
    return manifest


def _settle(folder: Path) -> None:
    """Move what a writer has committed to its place: `place.Settle` for bundles. Until the last step, the manifest, no
    file is listed that is not there, whole.
    """
    staged = folder / place.COMMITTED
    names = [name for name in _found(staged) if name != MANIFEST]
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
        manifest = _read_manifest(folder)
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


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", hint="Make one with `fope-export export`.")
    try:
        data = read_object(path)
        if (version := data.get("format_version")) != FORMAT_VERSION:
            raise BundleError(
                f"{path}: format version {cut(version)}, this program reads {FORMAT_VERSION}",
                hint="Export the checkpoint again with this version.",
            )
        return as_record(data, Manifest, str(path))
    except DocumentError as cause:
        raise BundleError(f"not a valid manifest: {cause}", hint=AGAIN) from cause


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
