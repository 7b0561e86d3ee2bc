"""The folder that one stage writes and the next reads: a manifest with hashes, written whole or not at all."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Self

import msgspec

from fope_export.config import Count, ExportConfig, ModelConfig, Size, SpectrumConfig
from fope_export.documents import as_record, read_object
from fope_export.errors import BundleError, ConfigError, DocumentError, cut

MANIFEST = "fope_export.json"
MODEL = "model.onnx"
OPTIMISED = "model.cpu.onnx"
"""The same model for ONNX Runtime alone; its weights are those of the first."""
KEPT = "logits_to_keep"
"""Its input, int64 [kept]: the new tokens whose logits are wanted, counted from each row's end. Who does not give it
gets those of the last, -1.
"""
REPORTS, ENGINES = "reports/", "engines/"
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
        """Read the bundle in folder `path`; `verify` also compares every file with its hash.

        Raises BundleError naming the folder or file, and what to do.
        """
        folder = Path(path)
        bundle = cls(folder, _read_manifest(folder))
        if verify and (damaged := bundle.damaged()):
            name, reason = next(iter(damaged.items()))
            raise BundleError(
                f"{folder / name}: {reason}",
                hint="Export the checkpoint again; `fope-export validate` shows what the change did.",
            )
        return bundle

    @property
    def model(self) -> Path:
        return self.path / MODEL

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

    def add(self, files: Mapping[str, bytes | Path]) -> Self:
        """Add or replace files, of some content or moved from a path on the same disk; interrupted anywhere, what
        remains is still a valid bundle.
        """
        others = {name: digest for name, digest in self.manifest.files.items() if name not in files}
        _write_manifest(self.path, msgspec.structs.replace(self.manifest, files=others))
        for name, content in files.items():
            _write(self.path / name, content)
        added = {name: sha256(self.path / name) for name in files}
        manifest = msgspec.structs.replace(self.manifest, files=dict(sorted((others | added).items())))
        _write_manifest(self.path, manifest)
        return type(self)(self.path, manifest)


def judged_files(manifest: Manifest) -> dict[str, str]:
    """The hashes of the files that a parity report is about: all but reports and engines, which come later."""
    return {name: digest for name, digest in manifest.files.items() if not name.startswith((REPORTS, ENGINES))}


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def creating(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write a bundle into; it becomes `out` when the block ends with a manifest in it.

    An error leaves `out` as it was, and so does a kill; where one falls between the two renames that replace a bundle,
    the next call brings the old one back first. Raises BundleError when `out` is not free for a bundle.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    check_target(out)
    work = out.parent / f".{out.name}.{os.getpid()}.partial"
    work.mkdir()
    try:
        yield work
        _read_manifest(work)
        _put_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_target(out: Path) -> None:
    """Raises BundleError unless `out` is free, an empty folder, or a bundle with nothing else in it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        listed = _read_manifest(out).files.keys() | {MANIFEST}
    except BundleError as cause:
        raise BundleError(
            f"{out} exists and would be lost; nothing was written: {cause}", hint="Choose another folder, or remove it."
        ) from cause
    found = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    if others := sorted(name for name in found if name not in listed and not Path(name).name.startswith(".")):
        raise BundleError(
            f"{out} holds {others[0]}, which is not the bundle's and would be lost; nothing was written",
            hint="Move it away, or choose another folder.",
        )


def complete(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest` with the hashes of all files of `folder`: the last write of a bundle."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = msgspec.structs.replace(manifest, files={p.relative_to(folder).as_posix(): sha256(p) for p in files})
    _write_manifest(folder, manifest)
    return manifest


def _put_in_place(work: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    if out.exists():
        out.rename(old)
    try:
        work.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Undo what runs that no longer live have left beside `out`."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(\d{{1,9}})\.(partial|old)")
    for path in sorted(out.parent.iterdir()):
        if (match := pattern.fullmatch(path.name)) and not _alive(int(match[1])):
            if match[2] == "old" and not out.exists():
                path.rename(out)
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


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
    _write(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _write(path: Path, content: bytes | Path) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = content if isinstance(content, Path) else path.with_name(f".{path.name}.partial")
    if isinstance(content, bytes):
        partial.write_bytes(content)
    partial.replace(path)
