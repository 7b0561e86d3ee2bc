"""From stored tensors to the decoder's: every one accounted for, of the right shape, read as its layout says."""

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fope_export.errors import CheckpointError
from fope_export.model.decoder import Decoder
from fope_export.model.fp8 import SCALE
from fope_export.model.layouts.base import Layout, WeightMap

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


def assemble(weight_map: WeightMap, tensors: Mapping[str, Tensor], model: Decoder, path: Path) -> dict[str, Tensor]:
    """The decoder's state dict in float32, of the tensors in `path` by the map's names.

    Raises CheckpointError naming the first tensor that is missing, left over, or not what the map says.
    """
    # Of tensors that are one, a writer may keep either name (safetensors' save_model keeps the first of the alphabet).
    copies = weight_map.copies.items()
    kept = {original: name for name, original in copies if name in tensors and original not in tensors}
    tensors = {**tensors, **{original: tensors[name] for original, name in kept.items()}}
    _check_names(weight_map, tensors, path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = dict(weight_map.constants)
    for name, sources in weight_map.sources.items():
        state[name] = weight_map.made(name, [in_float32(weight_map, tensors, source, path) for source in sources])
        _check(state[name], shapes[name], f"{path}: {sources[0]}", weight_map.split)
        if name.endswith(".freq"):
            _check_whole(tensors[sources[0]], f"{path}: {sources[0]}")
    for name, value in weight_map.checksums.items():
        if name in tensors:
            _check_frequencies(tensors[name], value, f"{path}: {name}")
    for name, original in copies:
        if name in tensors:
            check_copy(weight_map, tensors, name, original, path)
    return state


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


def in_float32(weight_map: WeightMap, tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """A stored tensor, multiplied out where it is of 8 bits."""
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
    if scale is None:
        return tensor.to(torch.float32).contiguous()
    if weight_map.fp8 is None:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}, and the configuration has no quantization_config",
            hint="It says what the scales stand for: bring the config.json that was written with the weights.",
        )
    return weight_map.fp8.multiplied(name, tensor, scale, f"{path}: {name}")


def _check_whole(stored: Tensor, where: str) -> None:
    if stored.itemsize < torch.float32.itemsize:
        raise CheckpointError(
            f"{where} was rounded to {stored.dtype}, and angles need float32",
            hint="Cast the weights, and leave what is under rotary as it is.",
        )


def check_copy(weight_map: WeightMap, tensors: Mapping[str, Tensor], name: str, of: str, path: Path) -> None:
    """Raises CheckpointError unless the tensor `name` is the one `of` which it is a copy."""
    if not torch.equal(in_float32(weight_map, tensors, name, path), in_float32(weight_map, tensors, of, path)):
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


def _check(tensor: Tensor, shape: torch.Size, where: str, split: str = "") -> None:
    if where.endswith("_coef") and tensor.ndim == 3 == len(shape) and tensor.shape[1] != shape[1]:
        raise CheckpointError(
            f"{where}: D is {tensor.shape[1]} in the weights but {shape[1]} from the configuration",
            hint=split or LENGTH,
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{where} has shape {tuple(tensor.shape)}, expected {tuple(shape)}",
            hint="The configuration and the weights belong to different models.",
        )
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(
            f"{where} holds NaN or infinity", hint="The training run diverged, or the file is damaged."
        )
