"""What a checkpoint layout has to say about a folder before its tensors are read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fope_export.config import ModelConfig
from fope_export.errors import CheckpointError


@dataclass(frozen=True)
class Blueprint:
    """The decoder that a folder's configuration describes, and where each of its tensors comes from.

    `sources` maps decoder tensors to the stored tensors they are made of, `constants` holds those that no file stores,
    and `adapt` makes one (by its decoder name) of the stored ones. `checksums` are tensors that a file may also store,
    with the values that they must then have.
    """

    config: ModelConfig
    sources: Mapping[str, tuple[str, ...]]
    constants: dict[str, Tensor] = field(default_factory=dict)
    adapt: Callable[[str, list[Tensor]], Tensor] = lambda name, tensors: join(tensors)
    checksums: dict[str, Tensor] = field(default_factory=dict)


def join(tensors: list[Tensor]) -> Tensor:
    """Stored tensors on top of each other, as the rows of one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True)
class Format:
    """A checkpoint layout: how it is recognised, which weight files it may have (preferred first), how it is read.

    `tensor_name` undoes a layout's encoding of names in the weight file; `foreign` names are of another model there.
    """

    name: str
    evidence: str
    weights: tuple[str, ...]
    recognise: Callable[[Path], bool]
    plan: Callable[[Path], Blueprint]
    tensor_name: Callable[[str], str] = lambda key: key
    foreign: Callable[[str], bool] = lambda name: False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is not one."""
    try:
        data = json.loads(path.read_text())
    except ValueError as cause:
        raise CheckpointError(f"{path}: not valid JSON: {cause}", hint="Is the file complete?") from cause
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}", hint="Is it the model's?")
    return data


def model_type(folder: Path) -> str | None:
    """`model_type` of the folder's config.json, if there is one."""
    path = folder / "config.json"
    return read_json(path).get("model_type") if path.is_file() else None
