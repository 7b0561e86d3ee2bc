"""Strict loading: every tensor present, none left over, every shape and number right, and no code executed."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from fope_export.bundle import Bundle, sha256
from fope_export.config import ModelConfig, as_written
from fope_export.errors import BundleError, CheckpointError, ConfigError
from fope_export.model.assembly import assemble, named
from fope_export.model.blueprint import Format, read_json
from fope_export.model.decoder import Decoder
from fope_export.model.formats import recognise
from fope_export.tokens import GENERATION, ends_of

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and found consistent. `model` is a float32 decoder in eval mode."""

    path: Path
    dialect: str
    config: ModelConfig
    model: Decoder
    files: tuple[Path, ...]
    """The files it was read from: configuration, weights, tokenizer."""

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        return tuple(path for path in self.files if path.name in TOKENIZER_FILES)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each of `files`, by name."""
        return {path.name: sha256(path) for path in self.files}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read the checkpoint in folder `path`.

    Raises CheckpointError or ConfigError with the file, what was expected, what was found and what to do.
    """
    folder = Path(path)
    layout = recognise(folder)
    plan = layout.plan(folder)
    config = _with_ends(plan.config, folder)
    weights = _weights_file(folder, layout)
    stored, shards = read_tensors(weights)
    tensors = named(stored, layout, plan, weights)
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(assemble(plan, tensors, model, weights), assign=True, strict=False)
    if plan.config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    _check_spectra(model, weights)
    names = ("config.yaml", "config.json", GENERATION, weights.name, *shards, *TOKENIZER_FILES)
    files = tuple(folder / name for name in names if (folder / name).is_file())
    return Checkpoint(folder, layout.name, config, model.eval().requires_grad_(False), files)


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
    if (found := checkpoint.hashes()) != source.files:
        differing = sorted(name for name in found.keys() | source.files if found.get(name) != source.files.get(name))
        raise BundleError(
            f"{folder} is not the checkpoint that {bundle.path} was exported from: {', '.join(differing)} differ",
            hint="Give the original with --checkpoint, or export again.",
        )
    return checkpoint


def _weights_file(folder: Path, layout: Format) -> Path:
    for name in layout.weights:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder}: no weights, expected {' or '.join(layout.weights)}",
        hint=f"The folder looks like layout {layout.name} ({layout.evidence}).",
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a .safetensors, .pt or .bin file, or of all files of a .safetensors.index.json, and the names of
    these files; memory-mapped where the file allows it.

    Raises CheckpointError when one is missing or truncated, is not such a file, or holds anything but tensors.
    """
    if path.suffix != ".json":
        return _read_file(path), ()
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in index.values()
    ):
        raise CheckpointError(f"{path}: no weight_map from tensors to files", hint="Is it the weights' index?")
    shards = tuple(sorted(set(index.values())))
    for name in shards:
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: {name} is not there", hint="Copy all files that the index names.")
    found = {key: (name, tensor) for name in shards for key, tensor in _read_file(path.parent / name).items()}
    if misplaced := [key for key in found.keys() | index.keys() if found.get(key, ("",))[0] != index.get(key)]:
        raise CheckpointError(
            f"{path}: {min(misplaced)} is not in the file that the index says",
            hint="Index and files are of different checkpoints.",
        )
    return {key: tensor for key, (_, tensor) in found.items()}, shards


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a pickle protocol that it may not read: then it raises too
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as cause:
        raise CheckpointError(
            f"{path}: not a plain file of tensors",
            hint="Only plain state dicts are read; nothing in a checkpoint is executed.",
        ) from cause
    except Exception as cause:  # a damaged file can raise anything
        reason = str(cause).partition(". ")[0]
        raise CheckpointError(
            f"{path}: cannot be read: {reason}", hint="The file looks truncated or damaged: copy it again."
        ) from cause
    if not isinstance(data, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, found {type(data).__name__}",
            hint="Save the model's state_dict() alone.",
        )
    return dict(data)


def _check_spectra(model: Decoder, path: Path) -> None:
    for i, attention in enumerate(model.attentions()):
        try:
            attention.rotary.spectrum  # noqa: B018 (checked at birth)
        except ConfigError as cause:
            raise CheckpointError(
                f"{path}: layer {i}: {cause}", hint="Was the file written by another tool?"
            ) from cause
