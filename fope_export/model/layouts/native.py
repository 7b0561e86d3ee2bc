"""Our own layout: config.json states every field of ModelConfig, model.safetensors the decoder's own tensors."""

from pathlib import Path

import msgspec
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fope_export.config import CONTRADICTION, ModelConfig, convert
from fope_export.errors import CheckpointError, ConfigError
from fope_export.fope import contract, frequencies
from fope_export.model.decoder import Decoder
from fope_export.model.experts import interleaved
from fope_export.model.layouts.base import CONFIG, Layout, Pieces, WeightMap, join, model_type, read_json

WEIGHTS = "model.safetensors"


def _read(folder: Path) -> WeightMap:
    path = folder / CONFIG
    config = convert(read_json(path), ModelConfig, where=str(path))
    _check_training_length(config, path)
    copies = {"lm_head.weight": "embed.weight"} if config.tie_embeddings else {}
    sources = {name: (name,) for name in stored_names(config)}
    return WeightMap(config, sources, adapt=_adapt, copies=copies, pieces=lambda name: Pieces.ROWS)


PROJ, OUT = "feed_forward.proj", "feed_forward.out"
"""Experts' weights, which a file has as [N, inputs, outputs], with `up` before `gate`."""


def _adapt(name: str, tensors: list[Tensor]) -> Tensor:
    stored = join(tensors)
    if name.endswith(PROJ):
        up, gate = stored.transpose(1, 2).chunk(2, dim=1)
        return interleaved(gate, up)
    return stored.transpose(1, 2).contiguous() if name.endswith(OUT) else stored


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """What `_adapt` made."""
    if name.endswith(PROJ):
        tensor = torch.cat((tensor[:, 1::2], tensor[:, ::2]), dim=1)
    return tensor.transpose(1, 2) if name.endswith((PROJ, OUT)) else tensor


def _check_training_length(config: ModelConfig, path: Path) -> None:
    """The training length decided D: recompute it where the frequencies are a plain floored exponential."""
    if not config.floored or config.rope_theta is None:
        return
    freq = frequencies.exponential(config.rope_theta, config.spectrum.head_dim)
    wanted = int((frequencies.floor_to_zero(freq, config.training_length) != 0).sum())
    if wanted != config.spectrum.frequencies:
        raise CheckpointError(
            f"{path}: D is {config.spectrum.frequencies}, but a training_length of {config.training_length} "
            f"keeps {wanted} frequencies",
            hint="training_length must be the training length, not the length that is exported or served.",
        )


def stored_names(config: ModelConfig) -> list[str]:
    """The tensors of a decoder that a file holds: all, or all but the head's where it is the embedding's."""
    with torch.device("meta"):
        names = list(Decoder(config).state_dict())
    return [name for name in names if not (config.tie_embeddings and name == "lm_head.weight")]


def save(model: Decoder, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` into an existing folder. `dtype` rounds the weights; the rotation's numbers stay float32, and are
    those of its spectrum, normalization applied.

    Raises ConfigError when a layer's spectrum is not of the kind that the model's configuration states.
    """
    state = model.state_dict()
    tensors = {name: _as_stored(name, state[name]).to(dtype).contiguous() for name in stored_names(model.config)}
    for i, attention in enumerate(model.attentions()):
        spectrum = attention.rotary.spectrum
        if spectrum.config != model.config.spectrum:
            raise ConfigError(f"layer {i} has {spectrum.config}, not {model.config.spectrum}", hint=CONTRADICTION)
        for port in contract.NUMBERS:
            tensors[f"layers.{i}.attention.rotary.{port.name}"] = torch.from_numpy(getattr(spectrum, port.name))
    (folder / WEIGHTS).write_bytes(to_safetensors(tensors))
    (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(model.config), indent=2) + b"\n")


LAYOUT = Layout(
    evidence='config.json with model_type "fope"',
    configuration=CONFIG,
    weights=(WEIGHTS,),
    recognize=lambda folder: model_type(folder) == "fope",
    read=_read,
)
