"""Strict loading: every tensor present, none left over, every shape and number right, and no code executed."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from fope_export.bundle import Bundle, sha256
from fope_export.config import ModelConfig, as_written
from fope_export.documents import check_file
from fope_export.errors import BundleError, CheckpointError, ConfigError
from fope_export.model.assembly import assemble, named
from fope_export.model.decoder import Decoder
from fope_export.model.layouts import layouts, recognize
from fope_export.model.layouts.base import Layout
from fope_export.model.tensors import read_tensors
from fope_export.tokens import GENERATION, ends_of

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and found consistent, its `layout` by name. `model` is a float32 decoder in eval mode."""

    path: Path
    layout: str
    config: ModelConfig
    model: Decoder
    files: tuple[Path, ...]
    """The files it was read from: configuration, weights, tokenizer."""
    reading: Mapping[str, str] = field(default_factory=dict)
    """In words, whose reading of the configuration was taken, and what was done to the coefficients."""

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
    folder = Path(path)
    name, layout = recognize(folder)
    weight_map = layout.read(folder)
    weights = _weights_file(folder, name, layout)
    stored, shards = read_tensors(weights)
    tensors = named(stored, layout, weight_map, weights)
    if weight_map.fitted:
        weight_map = weight_map.fitted({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    config = _with_ends(weight_map.config, folder)
    _check_size(weight_map.config, tensors, weights)
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(assemble(weight_map, tensors, model, weights), assign=True, strict=False)
    if weight_map.config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    _check_spectra(model, weights)
    configurations = dict.fromkeys(each.configuration for _, each in layouts())
    written = (*configurations, GENERATION, weights.name, *shards, *TOKENIZER_FILES)
    files = tuple(path for each in written if (path := folder / each).exists())
    for path in files:
        check_file(path, raises=CheckpointError)
    return Checkpoint(folder, name, config, model.eval().requires_grad_(False), files, weight_map.reading)


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
    checkpoint = load_checkpoint(folder)
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
