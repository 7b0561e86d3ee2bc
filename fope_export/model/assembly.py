"""From stored tensors to the decoder's: every one accounted for, of the right shape, read as its layout says."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor

from fope_export.errors import CheckpointError
from fope_export.model.decoder import Decoder
from fope_export.model.fp8 import SCALE
from fope_export.model.layouts.base import Layout, Pieces, WeightMap
from fope_export.model.tensors import release

PIECE = 1 << 22
"""Numbers of a large tensor that are made at once, where it can be made in pieces."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that torch.compile, FSDP and activation checkpointing put around another, anywhere, and that hold nothing."""

T = TypeVar("T")


def named(stored: Mapping[str, T], layout: Layout, weight_map: WeightMap, path: Path) -> dict[str, T]:
    """The decoder's tensors (or what is said of them) by the names that the map knows: decoded, and without what its
    model was wrapped in.

    What stands before every name (`module.` of DataParallel) goes where the rest is then what the map wants.

    Raises CheckpointError where two tensors would get one name.
    """
    bare: dict[str, str] = {}
    for name in stored:
        short = ".".join(part for part in layout.tensor_name(name).split(".") if part not in WRAPPERS)
        if (other := bare.setdefault(short, name)) != name:
            raise CheckpointError(
                f"{path}: {other} and {name} are both {short}", hint="Save the state_dict of one model alone."
            )
    prefix, *others = sorted(_prefixes(wanted_names(weight_map), bare)) or [""]
    if not others and all(name.startswith(prefix) for name in bare):
        bare = {name.removeprefix(prefix): original for name, original in bare.items()}
    return {name: stored[original] for name, original in bare.items() if not layout.foreign(name)}


def wanted_names(weight_map: WeightMap) -> set[str]:
    """The stored tensors that the decoder is made of."""
    return {name for names in weight_map.sources.values() for name in names}


def _prefixes(wanted: Container[str], names: Iterable[str]) -> set[str]:
    """What stands before wanted names among `names`; "" where one stands alone."""
    dots = ((name, i) for name in names for i in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")))
    return {name[:i] for name, i in dots if name[i:] in wanted}


@dataclass(frozen=True)
class Weights:
    """A decoder's tensors in float32. Each is made of the stored ones when it is asked for, checked then, and kept by
    nobody here.
    """

    weight_map: WeightMap
    stored: Mapping[str, Tensor]
    """By the map's names, in the dtypes that they are stored in; of a file that is mapped."""
    shapes: Mapping[str, torch.Size]
    """Of the decoder's tensors."""
    path: Path

    @classmethod
    def of(cls, weight_map: WeightMap, tensors: Mapping[str, Tensor], model: Decoder, path: Path) -> Self:
        """Of the tensors in `path` by the map's names, for `model`, whose own have no numbers.

        Raises CheckpointError naming the first tensor that is missing, left over, or of another kind or shape than the
        map says, and the first of the second copies and frequencies that is not what it must be.
        """
        # Of tensors that are one, a writer may keep either name (safetensors' save_model keeps the first of the
        # alphabet).
        copies = weight_map.copies.items()
        kept = {original: name for name, original in copies if name in tensors and original not in tensors}
        tensors = {**tensors, **{original: tensors[name] for original, name in kept.items()}}
        _check_names(weight_map, tensors, path)
        made = cls(weight_map, tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, path)
        for name in weight_map.sources:
            made._check(name)
        for name, value in weight_map.checksums.items():
            if name in tensors:
                _check_frequencies(tensors[name], value, f"{path}: {name}")
        for name, original in copies:
            if name in tensors:
                check_copy(weight_map, tensors, name, original, path)
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """Of all decoder tensors that are made; a tied head is the embedding."""
        return (*self.weight_map.constants, *self.weight_map.sources)

    def whole(self, name: str) -> Tensor:
        """The decoder's tensor `name`. Raises CheckpointError where it is not finite, or has scales that it cannot."""
        if name in self.weight_map.constants:
            return self.weight_map.constants[name]
        sources = self.weight_map.sources[name]
        return self._finite(
            name,
            self.weight_map.made(
                name, [in_float32(self.weight_map, self.stored, source, self.path) for source in sources]
            ),
        )

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The same in pieces along the first axis, one at a time, as small as the map allows and `PIECE` asks for; in
        the dtype that is stored where that is no wider than float32 and the map only moves numbers.
        """
        sources, kind = self.weight_map.sources.get(name, ()), self.weight_map.pieces(name)
        if kind is Pieces.STACKED:
            each = len(sources) // self.shapes[name][0]
            for i in range(0, len(sources), each):
                parts = [_numbers(self.weight_map, self.stored, source, self.path) for source in sources[i : i + each]]
                yield self._finite(name, self.weight_map.made(name, parts))
                for part in parts:
                    release(part)
        elif kind is Pieces.ROWS and sources:
            for source in sources:
                for part in _rows(self.weight_map, self.stored, source, self.path):
                    yield self._finite(name, self.weight_map.made(name, [part]))
                    release(part)
        else:
            yield self.whole(name)

    def as_stored(self, name: str) -> Tensor | None:
        """The stored tensor that the decoder's tensor `name` is number for number, if there is one; not checked."""
        sources = self.weight_map.sources.get(name, ())
        if len(sources) != 1 or self.weight_map.pieces(name) is not Pieces.ROWS:
            return None
        stored = self.stored[sources[0]]
        made = self.weight_map.made(name, [stored])
        return made if made is stored and stored.is_contiguous() else None

    def check(self) -> None:
        """Make every tensor, a piece at a time. Raises CheckpointError naming the first that is not finite."""
        for name in self.names:
            for _ in self.pieces(name):
                pass

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise CheckpointError(
                f"{self.path}: {self.weight_map.sources[name][0]} holds NaN or infinity",
                hint="The training run diverged, or the file is damaged.",
            )
        return tensor

    def _check(self, name: str) -> None:
        """Raises CheckpointError where stored tensors are not of a kind and shape that make the decoder's `name`."""
        sources = self.weight_map.sources[name]
        for source in sources:
            _check_kind(self.weight_map, self.stored, source, self.path)
        without_numbers = [torch.empty(self.stored[source].shape, device="meta") for source in sources]
        where = f"{self.path}: {sources[0]}"
        made = self.weight_map.made(name, without_numbers)
        _check_shape(made.shape, self.shapes[name], where, self.weight_map.split)
        if name.endswith(".freq"):
            _check_whole(self.stored[sources[0]], where)


def _check_names(weight_map: WeightMap, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = wanted_names(weight_map)
    known = wanted | weight_map.copies.keys()
    known |= {name + SCALE for name in known} | weight_map.checksums.keys()
    for what, names, hint in (
        ("missing", wanted - tensors.keys(), _next_step(wanted, tensors)),
        ("left over", tensors.keys() - known, "The configuration describes a smaller model or another layout."),
    ):
        if names:
            raise CheckpointError(f"{path}: {len(names)} tensors {what}: {listed(names)}", hint=hint)


def listed(names: Iterable[str]) -> str:
    """The first three."""
    first, *more = sorted(names)
    return ", ".join((first, *more[:2])) + (", …" if len(more) > 2 else "")


def _next_step(wanted: Container[str], names: Iterable[str]) -> str:
    """Where tensors are missing."""
    prefixes = sorted(_prefixes(wanted, names) - {""})
    if not prefixes:
        return "The configuration describes a larger model or another layout."
    return f"Names begin with {' and with '.join(prefixes[:2])}: save the state_dict of one model alone."


def _check_kind(weight_map: WeightMap, tensors: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Raises CheckpointError where a stored tensor is no numbers, or of 8 bits other than the configuration says."""
    tensor, scale = tensors[name], tensors.get(name + SCALE)
    if not tensor.is_floating_point() or any(x is not None and x.layout != torch.strided for x in (tensor, scale)):
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}, {tensor.layout}; expected dense floating point",
            hint="Quantized (but for blockwise FP8) and sparse checkpoints are not read.",
        )
    if (tensor.itemsize == 1) != (scale is not None):
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype} {'without' if scale is None else 'and has'} {name}{SCALE}",
            hint="8-bit weights, and only they, come with a scale for each block.",
        )
    if scale is not None and weight_map.fp8 is None:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}, and the configuration has no quantization_config",
            hint="It says what the scales stand for: bring the config.json that was written with the weights.",
        )


def in_float32(weight_map: WeightMap, tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """A stored tensor, multiplied out where it is of 8 bits."""
    _check_kind(weight_map, tensors, name, path)
    tensor, scale = tensors[name], tensors.get(name + SCALE)
    if scale is None:
        return tensor.to(torch.float32).contiguous()
    assert weight_map.fp8  # _check_kind
    return weight_map.fp8.multiplied(name, tensor, scale, f"{path}: {name}")


def _rows(weight_map: WeightMap, tensors: Mapping[str, Tensor], name: str, path: Path) -> Iterator[Tensor]:
    """A stored tensor, some of its rows at a time."""
    stored = _numbers(weight_map, tensors, name, path)
    yield from stored.split(max(PIECE // max(stored[:1].numel(), 1), 1))


def _numbers(weight_map: WeightMap, tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """A stored tensor as it is; in float32 where it is of 8 or 64 bits."""
    stored = tensors[name]
    return stored.contiguous() if stored.itemsize in (2, 4) else in_float32(weight_map, tensors, name, path)


def _check_whole(stored: Tensor, where: str) -> None:
    if stored.itemsize < torch.float32.itemsize:
        raise CheckpointError(
            f"{where} was rounded to {stored.dtype}, and angles need float32",
            hint="Cast the weights, and leave what is under rotary as it is.",
        )


def check_copy(weight_map: WeightMap, tensors: Mapping[str, Tensor], name: str, of: str, path: Path) -> None:
    """Raises CheckpointError unless the tensor `name` is the one `of` which it is a copy."""
    for each in (name, of):
        _check_kind(weight_map, tensors, each, path)
    pairs = zip(*(_rows(weight_map, tensors, each, path) for each in (name, of)), strict=False)
    if tensors[name].shape != tensors[of].shape or not all(torch.equal(a.float(), b.float()) for a, b in pairs):
        raise CheckpointError(
            f"{path}: {name} and {of} differ, and the configuration says that they are one",
            hint="Which of them was trained? If both were, tie_word_embeddings (weight_tying) is false.",
        )


def _check_frequencies(stored: Tensor, value: Tensor, where: str) -> None:
    """Frequencies agree as far as their dtype can hold them, and as a power computed elsewhere may be rounded."""
    plain = stored.is_floating_point() and stored.itemsize > 1 and stored.layout == torch.strided
    if not plain or stored.numel() != value.numel():
        raise CheckpointError(
            f"{where} is {stored.dtype} {tuple(stored.shape)}, expected {value.numel()} frequencies",
            hint="The configuration describes another head_dim, training length or kind of position embedding.",
        )
    held = torch.finfo(stored.dtype)
    rtol, atol = held.eps + 8 * torch.finfo(torch.float32).eps, held.tiny * held.eps
    if not torch.allclose(stored.double().flatten(), value.double(), rtol=rtol, atol=atol):
        raise CheckpointError(
            f"{where} is not what the configuration gives", hint="Were the frequencies changed by hand?"
        )


LENGTH = "The configuration must state the training length, not the length that is exported or served."


def _check_shape(found: torch.Size, shape: torch.Size, where: str, split: str) -> None:
    """`split` is what else D could be."""
    if where.endswith("_coef") and len(found) == 3 == len(shape) and found[1] != shape[1]:
        raise CheckpointError(
            f"{where}: D is {found[1]} in the weights but {shape[1]} from the configuration", hint=split or LENGTH
        )
    if found != shape:
        raise CheckpointError(
            f"{where} has shape {tuple(found)}, expected {tuple(shape)}",
            hint="The configuration and the weights belong to different models.",
        )
