"""Strict loading: every tensor present, none left over, every shape and number right, and no code executed."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from fope_export.bundle import Bundle, sha256
from fope_export.config import ModelConfig, as_written
from fope_export.documents import check_file
from fope_export.errors import BundleError, CheckpointError, ConfigError
from fope_export.manifest import AdapterSource, Source
from fope_export.model.adapters import read_adapter
from fope_export.model.assembly import Weights, named
from fope_export.model.decoder import Decoder
from fope_export.model.layouts import ADAPTER, check_no_adapter, layouts, recognize
from fope_export.model.layouts.base import Layout
from fope_export.model.tensors import read_tensors
from fope_export.tokens import GENERATION, ends_of

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


ROTARY = ".attention.rotary."
"""In the names of a rotation's numbers."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and found consistent, its `layout` by name."""

    path: Path
    layout: str
    config: ModelConfig
    files: tuple[Path, ...]
    """The files it was read from: configuration, weights, tokenizer."""
    weights: Weights
    """The decoder's tensors, which are made one at a time."""
    reading: Mapping[str, str] = field(default_factory=dict)
    """In words, whose reading of the configuration was taken, and what was done to the coefficients."""
    adapter: Path | None = None
    """The folder of the adapter that is merged into it."""
    adapter_files: tuple[Path, ...] = ()
    """What of it was read. With a tokenizer, that is the model's."""

    @cached_property
    def model(self) -> Decoder:
        """A float32 decoder in eval mode, all of it in memory. Raises CheckpointError where weights are not finite."""
        return self._decoder({name: self.weights.whole(name) for name in self.weights.names})

    @cached_property
    def outline(self) -> Decoder:
        """The same without the numbers of its matrices, which are on the device "meta": vectors and rotations alone."""
        small = (name for name in self.weights.names if len(self.weights.shapes[name]) < 2 or ROTARY in name)
        return self._decoder({name: self.weights.whole(name) for name in small})

    def _decoder(self, state: dict[str, Tensor]) -> Decoder:
        with torch.device("meta"):
            model = Decoder(self.config)
        model.load_state_dict(state, assign=True, strict=False)
        if self.config.tie_embeddings:
            model.lm_head.weight = model.embed.weight
        return model.eval().requires_grad_(False)

    @property
    def dialect(self) -> str:
        """The former name of `layout`."""
        warnings.warn("Checkpoint.dialect is called layout", DeprecationWarning, stacklevel=2)
        return self.layout

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        own, added = (
            tuple(path for path in files if path.name in TOKENIZER_FILES) for files in (self.files, self.adapter_files)
        )
        return added or own

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer is, if it has one."""
        return next((path.parent for path in self.tokenizer_files), self.path)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each of `files`, by name."""
        return {path.name: sha256(path) for path in self.files}

    def source(self, hashes: dict[str, str] | None = None) -> Source:
        """What a bundle's manifest says of it; with `hashes` where they are known."""
        adapter = None
        if self.adapter is not None:
            added = {path.name: sha256(path) for path in self.adapter_files}
            adapter = AdapterSource(path=str(self.adapter.resolve()), files=added)
        files = self.hashes() if hashes is None else hashes
        return Source(path=str(self.path.resolve()), layout=self.layout, files=files, adapter=adapter)


def load_checkpoint(path: str | Path, *, adapter: str | Path | None = None) -> Checkpoint:
    """Read the checkpoint in folder `path`, whose layout is recognized by what lies there. No code of it is executed,
    and every tensor must be there, in its shape, with none left over. `adapter` is a folder with a LoRA adapter that
    PEFT saved, which is merged into it.

    Raises CheckpointError where files are missing or contradict each other, and ConfigError for a configuration that no
    model can have, or an adapter that is no such one; all name the file.

    >>> import fope_export as fx
    >>> checkpoint = fx.load_checkpoint("checkpoint")
    >>> checkpoint.layout, checkpoint.config.num_layers
    ('native', 2)
    """
    checkpoint = open_checkpoint(path, adapter=adapter)
    _ = checkpoint.model
    return checkpoint


def open_checkpoint(path: str | Path, *, adapter: str | Path | None = None) -> Checkpoint:
    """The same before its weights are read: only when one is made is it known to be finite. Those that an adapter
    changes are in memory.
    """
    folder = Path(path)
    name, layout = recognize(folder)
    weight_map = layout.read(folder)
    file = _weights_file(folder, name, layout)
    stored, shards = read_tensors(file)
    tensors = named(stored, layout, weight_map, file)
    if weight_map.fitted:
        weight_map = weight_map.fitted({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    weight_map = replace(weight_map, config=_with_ends(weight_map.config, folder))
    _check_size(weight_map.config, tensors, file)
    adapter_files: tuple[Path, ...] = ()
    if adapter is not None:
        adapter = Path(adapter)
        adapted = read_adapter(adapter)
        tensors, weight_map = adapted.merged(tensors, layout, weight_map, file)
        has_tokens = adapted.check_tokenizer(weight_map.config.vocab_size)
        adapter_files = _there(adapter, ADAPTER, adapted.weights.name, *(TOKENIZER_FILES if has_tokens else ()))
    with torch.device("meta"):
        weights = Weights.of(weight_map, tensors, Decoder(weight_map.config), file)
    configurations = dict.fromkeys(each.configuration for _, each in layouts())
    files = _there(folder, *configurations, GENERATION, file.name, *shards, *TOKENIZER_FILES)
    checkpoint = Checkpoint(
        folder, name, weight_map.config, files, weights, weight_map.reading,
        adapter=Path(adapter) if adapter else None, adapter_files=adapter_files,
    )  # fmt: skip
    _check_spectra(checkpoint.outline, file)
    return checkpoint


def _there(folder: Path, *names: str) -> tuple[Path, ...]:
    """Those files that are in `folder`. Raises CheckpointError where one is no file."""
    files = tuple(path for name in names if (path := folder / name).exists())
    for path in files:
        check_file(path, raises=CheckpointError)
    return files


def _with_ends(config: ModelConfig, folder: Path) -> ModelConfig:
    """The tokens of generation_config.json end a text too."""
    ends = as_written((*config.ends, *ends_of(folder)))
    try:
        return msgspec.structs.replace(config, eos_token_id=ends)
    except ConfigError as cause:
        raise ConfigError(f"{folder / GENERATION}: {cause}", hint=cause.hint) from cause


def source_of(bundle: Bundle, path: str | Path | None = None, adapter: str | Path | None = None) -> Checkpoint:
    """The checkpoint that `bundle` was made from, at `path` or where it then was, with the adapter that was merged into
    it, if one was, at `adapter` or where that was.

    Raises BundleError when one is not there or its files are not the ones that were exported, and for a module.
    """
    bundle.manifest.decoder()
    source = bundle.manifest.source
    if adapter and not source.adapter:
        raise BundleError(
            f"{bundle.path} was exported without an adapter", hint="Leave --adapter out, or export again with it."
        )
    folder = _folder(bundle, path or source.path, "checkpoint")
    merged = _folder(bundle, adapter or source.adapter.path, "adapter") if source.adapter else None
    checkpoint = open_checkpoint(folder, adapter=merged)
    found = checkpoint.source()
    _check_same(bundle, folder, found.files, source.files, "checkpoint")
    if merged and found.adapter and source.adapter:
        _check_same(bundle, merged, found.adapter.files, source.adapter.files, "adapter")
    return checkpoint


def _folder(bundle: Bundle, path: str | Path, what: str) -> Path:
    """Raises BundleError where a bundle's checkpoint or adapter (`what`) is not at `path`."""
    if not Path(path).is_dir():
        raise BundleError(
            f"{bundle.path}: its {what} is not at {path}", hint=f"Say where it is with --{what}, or bring it back."
        )
    return Path(path)


def _check_same(bundle: Bundle, folder: Path, found: dict[str, str], wanted: dict[str, str], what: str) -> None:
    """Raises BundleError where files in `folder` are not those, by name, that the bundle was exported from."""
    if differing := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        raise BundleError(
            f"{folder} is not the {what} that {bundle.path} was exported from: {', '.join(differing)} differ",
            hint=f"Give the original with --{what}, or export again.",
        )


def _check_size(config: ModelConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError before a decoder is made that is far larger than its weights."""
    if config.num_layers > len(tensors):
        raise CheckpointError(
            f"{path}: {len(tensors)} tensors for {config.num_layers} layers: there are some missing",
            hint="The configuration describes a larger model or another layout.",
        )


def _weights_file(folder: Path, name: str, layout: Layout) -> Path:
    for file in layout.weights:
        if (folder / file).exists():
            return folder / file
    check_no_adapter(folder)
    raise CheckpointError(
        f"{folder}: no weights, expected {' or '.join(layout.weights)}",
        hint=f"The folder looks like layout {name} ({layout.evidence}).",
    )


def _check_spectra(model: Decoder, path: Path) -> None:
    for i, attention in enumerate(model.attentions()):
        try:
            attention.rotary.spectrum  # noqa: B018 (checked at birth)
        except ConfigError as cause:
            raise CheckpointError(
                f"{path}: layer {i}: {cause}", hint="Was the file written by another tool?"
            ) from cause
