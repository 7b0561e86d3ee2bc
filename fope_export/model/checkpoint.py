"""Strict loading: every tensor present, none left over, every shape and number right, and no code executed."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from fope_export.bundle import Bundle, sha256
from fope_export.config import ModelConfig, as_written
from fope_export.documents import check_file
from fope_export.errors import BundleError, CheckpointError, ConfigError
from fope_export.model.assembly import Weights, named
from fope_export.model.decoder import Decoder
from fope_export.model.layouts import layouts, recognize
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
        return tuple(path for path in self.files if path.name in TOKENIZER_FILES)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each of `files`, by name."""
        return {path.name: sha256(path) for path in self.files}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read the checkpoint in folder `path`, whose layout is recognized by what lies there. No code of it is executed,
    and every tensor must be there, in its shape, with none left over.

    Raises CheckpointError where files are missing or contradict each other, and ConfigError for a configuration that no
    model can have; both name the file.

    >>> import fope_export as fx
    >>> checkpoint = fx.load_checkpoint("checkpoint")
    >>> checkpoint.layout, checkpoint.config.num_layers
    ('native', 2)
    """
    checkpoint = open_checkpoint(path)
    _ = checkpoint.model
    return checkpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The same before its weights are read: only when one is made is it known to be finite."""
    folder = Path(path)
    name, layout = recognize(folder)
    weight_map = layout.read(folder)
    config = _with_ends(weight_map.config, folder)
    file = _weights_file(folder, name, layout)
    stored, shards = read_tensors(file)
    tensors = named(stored, layout, weight_map, file)
    _check_size(weight_map.config, tensors, file)
    with torch.device("meta"):
        weights = Weights.of(weight_map, tensors, Decoder(config), file)
    configurations = dict.fromkeys(each.configuration for _, each in layouts())
    written = (*configurations, GENERATION, file.name, *shards, *TOKENIZER_FILES)
    files = tuple(path for each in written if (path := folder / each).exists())
    for each in files:
        check_file(each, raises=CheckpointError)
    checkpoint = Checkpoint(folder, name, config, files, weights)
    _check_spectra(checkpoint.outline, file)
    return checkpoint


def _with_ends(config: ModelConfig, folder: Path) -> ModelConfig:
    """The tokens of generation_config.json end a text too."""
    ends = as_written((*config.ends, *ends_of(folder)))
    try:
        return msgspec.structs.replace(config, eos_token_id=ends)
    except ConfigError as cause:
        raise ConfigError(f"{folder / GENERATION}: {cause}", hint=cause.hint) from cause


def source_of(bundle: Bundle, path: str | Path | None = None) -> Checkpoint:
    """The checkpoint that `bundle` was made from, at `path` or where it then was.

    Raises BundleError when it is not there, when its files are not the ones that were exported, or when it is a module.
    """
    bundle.manifest.decoder()
    source = bundle.manifest.source
    folder = Path(path or source.path)
    if not folder.is_dir():
        raise BundleError(
            f"{bundle.path}: its checkpoint is not at {folder}",
            hint="Say where it is with --checkpoint, or bring it back.",
        )
    checkpoint = open_checkpoint(folder)
    if (hashes := checkpoint.hashes()) != source.files:
        differing = sorted(name for name in hashes.keys() | source.files if hashes.get(name) != source.files.get(name))
        raise BundleError(
            f"{folder} is not the checkpoint that {bundle.path} was exported from: {', '.join(differing)} differ",
            hint="Give the original with --checkpoint, or export again.",
        )
    return checkpoint


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
