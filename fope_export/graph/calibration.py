"""How large the inputs and weights of linear layers get, as NVIDIA Model Optimizer measures it on sample text."""

import copy
import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fope_export.corpus import python_source
from fope_export.documents import LISTING, read_bytes, read_json
from fope_export.errors import BundleError, ConfigError, ExportError, cut, require
from fope_export.model.decoder import Decoder
from fope_export.model.tensors import read_array
from fope_export.quantizations import QUANTIZATIONS
from fope_export.tokens import Tokenizer

SAMPLED = 1 << 13
"""Tokens to calibrate with."""
LONGEST = 1024
"""Tokens of a window at most."""
BYTES_PER_TOKEN = 8
"""Of text that is read for each token; few tokenizers make longer ones."""
SAMPLE_FILE = 1 << 28
"""Bytes of text at most."""
HINT = "Give --calibration FILE: text for the checkpoint's tokenizer, or token ids as .npy or .json."


class Ranges(NamedTuple):
    """The largest absolute values of a linear layer, on which its scales depend."""

    inputs: float
    weight: NDArray[np.float32]  # [outputs], or [] for the whole tensor


def calibrate(model: Decoder, kind: str, windows: NDArray[np.int64]) -> dict[str, Ranges]:
    """The ranges of every linear layer that Model Optimizer would quantize, by name; `windows` are token ids [N, S].

    They are measured in float32 on a copy of `model`, one window at a time.

    Raises BackendError without Model Optimizer, and ExportError where values are not finite.
    """
    ranges = {name: _ranges(layer) for name, layer in _optimized(model, kind, windows)}
    return {name: each for name, each in ranges.items() if each}


def smoothed(model: Decoder, kind: str, windows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """What every such layer's inputs are to be multiplied by, [inputs], and its weights divided by, so that rounding
    those in blocks changes the layer's outputs least; measured and refused as in `calibrate`.
    """
    found = {
        name: layer.input_quantizer.pre_quant_scale
        for name, layer in _optimized(model, kind, windows)
        if layer.weight_quantizer.is_enabled
    }
    return {name: scale.float().numpy() for name, scale in found.items()}


def _optimized(model: Decoder, kind: str, windows: NDArray[np.int64]) -> list[tuple[str, Any]]:
    """The linear layers of a copy of `model` that Model Optimizer has quantized, by name."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # that parts which are not used here are not installed
        optimizer = require("modelopt.torch.quantization", "modelopt")

        def run(calibrated: Decoder) -> None:
            for ids in torch.from_numpy(windows)[:, None]:
                positions = torch.arange(ids.shape[1])[None]
                logits = calibrated(ids, torch.ones_like(ids), positions, calibrated.empty_cache(1))[0]
                if not logits.isfinite().all():  # it rounds without regard to such a layer's inputs
                    raise ExportError("Model Optimizer cannot calibrate the model: logits are not finite", hint=HINT)

        recipe = getattr(optimizer, QUANTIZATIONS[kind].recipe)
        try:
            with torch.no_grad():
                measured = optimizer.quantize(copy.deepcopy(model).float(), recipe, forward_loop=run)
        except AssertionError as cause:  # how it refuses what is not finite
            raise ExportError(f"Model Optimizer cannot calibrate the model: {cause}", hint=HINT) from cause
    return [(name, part) for name, part in measured.named_modules() if isinstance(part, nn.Linear)]


def _ranges(layer: Any) -> Ranges | None:
    """What a layer's quantizers saw; None where they are switched off, or where there are none."""
    inputs, weight = (getattr(getattr(layer, f"{port}_quantizer", None), "amax", None) for port in ("input", "weight"))
    if inputs is None or weight is None:
        return None
    return Ranges(float(inputs), (weight.squeeze(-1) if weight.dim() else weight).numpy())


def calibration_windows(checkpoint: Path, file: Path | None, vocabulary: int, length: int) -> NDArray[np.int64]:
    """About SAMPLED token ids as windows [N, S] of a training `length`: from `file`, or from Python's standard library.

    Text is sampled evenly over the whole of it. Raises ConfigError where there is none, or no tokenizer for it.
    """
    length = min(length, LONGEST)
    if file and file.suffix in (".npy", ".json"):
        ids = _read_ids(file)
    else:
        ids = _sampled(
            checkpoint,
            read_bytes(file, most=SAMPLE_FILE, raises=ConfigError, hint=HINT)
            if file
            else python_source(held_out=False),
            length,
        )
    if ids.size == 0 or ids.min() < 0 or ids.max() >= vocabulary:
        source = file or f"Python's standard library with {checkpoint / 'tokenizer.json'}"
        raise ConfigError(f"{source} gives no token ids from 0 to {vocabulary - 1}", hint=HINT)
    length = min(length, ids.size)
    return ids[: max(SAMPLED // length, 1) * length][: ids.size // length * length].reshape(-1, length)


def _sampled(checkpoint: Path, text: bytes, length: int) -> NDArray[np.int64]:
    try:
        tokenizer = Tokenizer(checkpoint)
    except BundleError as cause:
        raise ConfigError(f"calibration needs text as tokens: {cause}", hint=HINT) from cause
    starts = np.linspace(0, len(text), -(-SAMPLED // length), endpoint=False, dtype=int)
    parts = (text[start : start + BYTES_PER_TOKEN * length].decode(errors="ignore") for start in starts)
    return np.concatenate([np.asarray(tokenizer.encode(part)[:length], np.int64) for part in parts])


def _read_ids(file: Path) -> NDArray[np.int64]:
    if file.suffix == ".npy":
        ids = read_array(file, hint=HINT)
    else:
        listed = read_json(file, most=LISTING, raises=ConfigError, hint=HINT)
        try:
            ids = np.asarray(listed)
        except ValueError as cause:  # lists of different lengths
            raise ConfigError(f"{file}: {cut(cause)}", hint=HINT) from cause
    if not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(f"{file} holds {ids.dtype}, expected integers", hint=HINT)
    return ids.astype(np.int64).ravel()
