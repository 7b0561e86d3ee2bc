"""What a checkpoint layout has to say about a folder before its tensors are read."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fope_export.config import ModelConfig
from fope_export.errors import CheckpointError


@dataclass(frozen=True)
class Blueprint:
    """The decoder that a folder's configuration describes, and where each of its tensors comes from.

    `sources` maps decoder tensors to their names in the file, `constants` holds those that no file stores, and
    `adapt` brings a stored tensor (by its decoder name) into the decoder's shape.
    """

    config: ModelConfig
    sources: dict[str, str]
    constants: dict[str, Tensor] = field(default_factory=dict)
    adapt: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor


@dataclass(frozen=True)
class Format:
    """A checkpoint layout: how it is recognised, which weight files it may have (preferred first), how it is read.

    `tensor_name` undoes a layout's encoding of names inside the weight file.
    """

    name: str
    evidence: str
    weights: tuple[str, ...]
    recognise: Callable[[Path], bool]
    plan: Callable[[Path], Blueprint]
    tensor_name: Callable[[str], str] = lambda key: key


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
