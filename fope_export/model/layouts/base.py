"""What a checkpoint layout has to say about a folder before its tensors are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fope_export.config import ModelConfig, SpectrumConfig
from fope_export.documents import read_object
from fope_export.errors import CheckpointError, ConfigError, cut
from fope_export.fope.spectrum import Spectrum
from fope_export.model.fp8 import Fp8

CONFIG = "config.json"
Shapes = Mapping[str, tuple[int, ...]]
"""What a file stores, by the names of a decoder that stands alone."""


class Pieces(Enum):
    """In which pieces along its first axis a decoder tensor can be made of stored ones, so that a large one need never
    be whole in memory.
    """

    WHOLE = auto()
    """It cannot."""
    ROWS = auto()
    """Each of its rows (or an expert's matrix) is made of one that is stored, in their order, by moving numbers."""
    STACKED = auto()
    """Each of its matrices is made of as many stored tensors, an expert's, by moving numbers."""


@dataclass(frozen=True)
class WeightMap:
    """The decoder that a folder's configuration describes, and where each of its tensors comes from.

    `sources` maps decoder tensors to the stored tensors they are made of, `constants` holds those that no file stores,
    and `adapt` makes one (by its decoder name) of the stored ones. `checksums` are frequencies that a file may also
    store, with the values that they must then have, and `copies` maps what it may store twice to what that must equal.
    `fp8` says how 8-bit weights are stored, if any may be. `reading` says in words what a configuration was taken for,
    and `split` where implementations disagree about D. `fitted` makes the map for what is stored, where the
    configuration leaves something open. `pieces` says, by a decoder tensor's name, of which parts of its stored ones
    `adapt` makes parts of it.
    """

    config: ModelConfig
    sources: Mapping[str, tuple[str, ...]]
    constants: dict[str, Tensor] = field(default_factory=dict)
    adapt: Callable[[str, list[Tensor]], Tensor] = lambda name, tensors: join(tensors)
    checksums: dict[str, Tensor] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    fp8: Fp8 | None = None
    reading: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    fitted: "Callable[[Shapes], WeightMap] | None" = None
    pieces: Callable[[str], Pieces] = lambda name: Pieces.WHOLE

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


@dataclass(frozen=True)
class Positions:
    """The position embedding of every layer, as a configuration describes it."""

    config: SpectrumConfig
    freq: Tensor
    """float32 [D]"""
    inv_freq: Tensor
    """What the code that the layout comes from computes, and may have stored: `freq`, and zeros where it keeps them."""
    whole: Spectrum | None = None
    """All numbers, where no coefficients are stored."""
    stored: Mapping[str, str] = field(default_factory=lambda: {name: name for name in ("sin_coef", "cos_coef")})
    """Our name of a coefficient tensor -> theirs."""
    adapt: Callable[[Tensor], Tensor] = lambda coef: coef
    """A stored coefficient tensor as [G, D, F]."""
    reading: Mapping[str, str] = field(default_factory=dict)
    split: str = ""

    def constants(self, rotary: str) -> dict[str, Tensor]:
        """What no file stores of the decoder's module `rotary`."""
        known = {} if self.whole is None else {name: getattr(self.whole, name) for name in self.stored}
        return {f"{rotary}.freq": self.freq} | {f"{rotary}.{name}": torch.from_numpy(x) for name, x in known.items()}

    def sources(self, rotary: str, embedding: str) -> dict[str, tuple[str, ...]]:
        """Where the coefficients of `rotary` are, in a file's module `embedding`."""
        stored = {} if self.whole is not None else self.stored
        return {f"{rotary}.{name}": (f"{embedding}.{theirs}",) for name, theirs in stored.items()}


def only_supported(flags: Any, table: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ConfigError naming the first flag whose value is not one of the table's."""
    for name, supported in table.items():
        if (value := getattr(flags, name)) not in supported:
            wanted = " or ".join(map(repr, supported))
            raise ConfigError(
                f"{name} is {value!r}, and only {wanted} is supported", hint="Open an issue with the config."
            )


def without_clashes(clashes: Mapping[str, Any]) -> None:
    """Raises ConfigError with the first message that holds."""
    for message, clash in clashes.items():
        if clash:
            raise ConfigError(message, hint="Check the flags against the training run's config.")


def join(tensors: list[Tensor]) -> Tensor:
    """Stored tensors on top of each other, as the rows of one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout: how it is recognized, which weight files it may have (preferred first), how it is read.

    `evidence` is what `recognize` looks for, in words; `read` makes a folder's `configuration` file the decoder and the
    names of its tensors, and raises CheckpointError or ConfigError where it says something else. `tensor_name` undoes a
    layout's encoding of names in the weight file; `foreign` names are of another model there.
    """

    evidence: str
    configuration: str
    weights: tuple[str, ...]
    recognize: Callable[[Path], bool]
    read: Callable[[Path], WeightMap]
    tensor_name: Callable[[str], str] = lambda key: key
    foreign: Callable[[str], bool] = lambda name: False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is not one."""
    return read_object(path, raises=CheckpointError)


def model_type(folder: Path) -> str | None:
    """`model_type` of the folder's config.json, if there is one."""
    path = folder / CONFIG
    named = read_json(path).get("model_type") if path.exists() else None
    return named if isinstance(named, str) else None
