"""What a checkpoint layout has to say about a folder before its tensors are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fope_export.config import ModelConfig
from fope_export.documents import read_object
from fope_export.errors import CheckpointError, cut


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

    def made(self, name: str, tensors: list[Tensor]) -> Tensor:
        """The decoder's tensor `name` of its stored ones. Raises CheckpointError where their shapes do not allow it."""
        try:
            return self.adapt(name, tensors)
        except (RuntimeError, IndexError, ValueError) as cause:  # how torch refuses shapes
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise CheckpointError(
                f"{self.sources[name][0]}: {name} cannot be made of shapes {cut(shapes)}",
                hint="The configuration and the weights belong to different models.",
            ) from cause


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
    return read_object(path, raises=CheckpointError)


def model_type(folder: Path) -> str | None:
    """`model_type` of the folder's config.json, if there is one."""
    path = folder / "config.json"
    named = read_json(path).get("model_type") if path.exists() else None
    return named if isinstance(named, str) else None
