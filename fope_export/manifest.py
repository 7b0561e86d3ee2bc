"""What `fope_export.json` says of a bundle, checked at birth."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import msgspec

from fope_export.config import Count, ExportConfig, ModelConfig, Size, SpectrumConfig
from fope_export.documents import as_record, read_object
from fope_export.dtypes import DTYPES, either
from fope_export.errors import BundleError, ConfigError, DocumentError, cut
from fope_export.quantizations import CACHES, CacheRounding

MANIFEST = "fope_export.json"
MODEL = "model.onnx"
OPTIMIZED = "model.ort.onnx"
"""The same model for ONNX Runtime alone; its weights are those of the first."""
ROUNDED_CACHE = "model.ort.cache.onnx"
"""The same as that, with rounded keys and values in its cache,"""
CALIBRATED_ON = "model.ort.cache.npy"
"""in steps that these token ids were measured for, int64 [N, S]."""
OPENVINO = "openvino/openvino_model.xml"
"""The same model for OpenVINO; all that it needs lies in the same folder, its weights too."""
TRANSFORMERS_JS = "onnx/model.onnx"
"""The portable file once more, where transformers.js looks for it, and with the name of a size that it wants."""
KEPT = "logits_to_keep"
"""Its input, int64 [kept]: the new tokens whose logits are wanted, counted from each row's end. Who does not give it
gets those of the last, -1.
"""
REPORTS, ENGINES = "reports/", "engines/"
FORMAT_VERSION = 2
OPTIMIZED_BEFORE = "model.cpu.onnx"
"""What bundles of format version 1 call OPTIMIZED."""
AGAIN = "Export the checkpoint again."
ELEMENTS = frozenset(
    "float float16 bfloat16 double int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128".split()
)
"""Element types of inputs and outputs."""
Name = Annotated[str, msgspec.Meta(min_length=1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
"""SHA-256 in hexadecimal; Python's $ alone lets a line feed follow, and JSON Schema has no \\Z."""
TERM = re.compile(r"([+-]?) ?(?:(\d+)\*)?(\w+)")
"""Symbolic sizes of inputs are sums of such terms: rows, 16*rows, past + sequence, length - 1."""
SUM = re.compile(rf"(?:{TERM.pattern} ?)+".replace("(\\d+)", "\\d{1,9}"))


class Port(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input or output of the graph; named sizes are symbolic."""

    name: Name
    dtype: str
    shape: list[Size | Name]

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENTS:
            raise ConfigError(f"{cut(self.name)} has the unknown dtype {cut(self.dtype)}", hint=AGAIN)

    def names(self) -> set[str]:
        """The symbolic sizes that its shape is made of. Raises ConfigError where a size is no sum of terms."""
        names = set()
        for size in (size for size in self.shape if isinstance(size, str)):
            if not SUM.fullmatch(size):
                raise ConfigError(f"{cut(self.name)} has the size {cut(size)}, expected a sum as past + 1", hint=AGAIN)
            names |= {name for _, _, name in TERM.findall(size) if not name.isdigit()}
        return names

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the symbolic sizes have these values."""
        return tuple(size if isinstance(size, int) else _value(size, sizes) for size in self.shape)


def _value(size: str, sizes: Mapping[str, int]) -> int:
    terms = (match.groups() for match in TERM.finditer(size))
    return sum(int(f"{sign}{factor or 1}") * (int(x) if x.isdigit() else sizes[x]) for sign, factor, x in terms)


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter that was merged into a checkpoint: `files` are SHA-256 by name."""

    path: str
    files: dict[Name, Digest]


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The checkpoint that a bundle was made from: `files` are SHA-256 by name. Of a module: its class, and the SHA-256
    of its `state_dict`.
    """

    path: str
    layout: str
    files: dict[Name, Digest]
    adapter: AdapterSource | None = None


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """The values of a symbolic size that the graph was traced for, from `min` to `max` (None: no end), and the
    example's.
    """

    min: Size
    example: Size
    max: Size | None

    def __post_init__(self) -> None:
        if not self.min <= self.example <= (self.example if self.max is None else self.max):
            raise ConfigError(f"{self.example} is not from {self.min} to {self.max}", hint=AGAIN)


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
    cache: str | msgspec.UnsetType = msgspec.UNSET
    """How optimized files keep keys and values, one of CACHES; unset where they do not round them."""

    def __post_init__(self) -> None:
        """Raises ConfigError where the parts contradict each other, or where a file lies outside of the folder."""
        for name in self.files:
            if not _stays(name):
                raise ConfigError(f"files has {cut(name)}, which is no file of the folder", hint=AGAIN)
        if self.export.opset is None:
            raise ConfigError("export.opset is missing", hint=AGAIN)
        if self.cache and self.cache not in CACHES:
            raise ConfigError(f"cache is {cut(self.cache)}, expected {either(CACHES.values())}", hint=AGAIN)
        self._check_spectra()
        self._check_ports()

    def having(self, *names: str) -> str:
        """The first of these names that a file of the bundle has, or nothing."""
        return next((name for name in names if name in self.files), "")

    @property
    def optimized(self) -> str:
        """The name of the optimized file, or nothing where there is none."""
        return self.having(OPTIMIZED, OPTIMIZED_BEFORE)

    @property
    def cache_rounding(self) -> CacheRounding | None:
        """How optimized files round keys and values; None where they do not."""
        return CACHES[self.cache] if self.cache else None

    def _check_spectra(self) -> None:
        if isinstance(self.model, ModelConfig):
            configs = [self.model.spectrum] * self.model.num_layers
        else:
            configs = list(self.model.rotations.values())
        freqs = [each["freq"] if each.keys() == SPECTRUM else None for each in self.spectra]
        counts = [len(freq) if isinstance(freq, list) else None for freq in freqs]
        if counts != (wanted := [config.frequencies for config in configs]):
            raise ConfigError(f"spectra has {cut(counts)} frequencies, expected {cut(wanted)}", hint=AGAIN)

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
SIZES = ("batch", "sequence", "past_sequence", "total_sequence")
"""Symbolic sizes of a decoder's inputs."""


def decoder_inputs(model: ModelConfig, export: ExportConfig) -> dict[str, Port]:
    """The inputs that a decoder's graph has, by name: the new tokens, and the cache of each layer."""
    batch, sequence, past, total = SIZES
    axes: list[int | str] = [model.spectrum.axes] if export.position_axes else []
    tokens: dict[str, list[int | str]] = {
        "input_ids": [batch, sequence],
        "attention_mask": [batch, total],
        "position_ids": [*axes, batch, sequence],
    }
    dtype = DTYPES[export.dtype].element
    room = export.capacity if export.cache == "static" else past
    if room is None:
        raise ConfigError("a static cache without a capacity", hint=AGAIN)
    cache: list[int | str] = [batch, model.num_kv_heads, room, model.spectrum.head_dim]
    names = (f"past_key_values.{i}.{part}" for i in range(model.num_layers) for part in ("key", "value"))
    ports = [Port(name=name, dtype="int64", shape=shape) for name, shape in tokens.items()]
    return {port.name: port for port in (*ports, *(Port(name=name, dtype=dtype, shape=cache) for name in names))}


def decoder_outputs(model: ModelConfig, export: ExportConfig) -> dict[str, Port | None]:
    """Its outputs by name, the cache's without what is said of them."""
    logits = Port(name="logits", dtype=DTYPES[export.dtype].element, shape=[*SIZES[:2], model.vocab_size])
    names = (f"present.{i}.{part}" for i in range(model.num_layers) for part in ("key", "value"))
    return {"logits": logits, **dict.fromkeys(names)}


def _compare(what: str, ports: list[Port], wanted: Mapping[str, Port | None]) -> None:
    """Raises ConfigError unless `ports` are those that are wanted, each once."""
    by_name = {port.name: port for port in ports}
    if not ports or len(by_name) < len(ports) or by_name.keys() != wanted.keys():
        different = sorted(by_name.keys() ^ wanted.keys()) or [*by_name, "any"]
        raise ConfigError(f"{what} has or lacks {cut(different[0])}", hint=AGAIN)
    for name, expected in wanted.items():
        if expected is not None and expected != by_name[name]:
            raise ConfigError(f"{what} has {cut(by_name[name])}, expected {expected}", hint=AGAIN)


def _stays(name: str) -> bool:
    """Whether a file of this name lies inside of the bundle's folder, on any system."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    anchor = PurePosixPath(name).anchor or PureWindowsPath(name).anchor
    return not anchor and ".." not in parts and "\0" not in name and name != MANIFEST


def plain_file(export: ExportConfig) -> str:
    """The portable file of a bundle that was exported so, for a runtime that lacks its dtype (`Dtype.widened`) or the
    numbers of its weights (`Quantization.widened`): where there are such runtimes, a second graph on the same weights,
    and else MODEL itself.
    """
    dtype, row = DTYPES[export.dtype], export.quantization
    return f"model.{(dtype.widened or dtype).precision}.onnx" if dtype.widened or (row and row.widened) else MODEL


def weights_file(export: ExportConfig) -> str:
    """Where the large tensors of a bundle that was exported so lie, for all its graphs."""
    return f"{TRANSFORMERS_JS}_data" if export.layout else f"{MODEL}.data"


def judged_files(manifest: Manifest) -> dict[str, str]:
    """The hashes of the files that a parity report is about: all but reports and engines, which come later."""
    return {name: digest for name, digest in manifest.files.items() if not name.startswith((REPORTS, ENGINES))}


def _of_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """As it would be written now. Files keep their names (`Manifest.having`)."""
    source = data.get("source")
    if isinstance(source, dict) and "dialect" in source:
        source = {"layout": source["dialect"]} | {name: value for name, value in source.items() if name != "dialect"}
    return data | {"format_version": FORMAT_VERSION, "source": source}


def read_manifest(folder: Path) -> Manifest:
    """What the manifest in `folder` says. Raises BundleError where there is none, or it says what cannot be."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}", hint="Make one with `fope-export export CKPT OUT`."
        )
    try:
        data = read_object(path)
        if (version := data.get("format_version")) not in (1, FORMAT_VERSION):
            raise BundleError(
                f"{path}: format version {cut(version)}, this program reads 1 to {FORMAT_VERSION}",
                hint="Export the checkpoint again with this version.",
            )
        return as_record(_of_version_1(data) if version == 1 else data, Manifest, str(path))
    except DocumentError as cause:
        raise BundleError(f"not a valid manifest: {cause}", hint=AGAIN) from cause
