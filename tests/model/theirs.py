"""The logits of the code that a checkpoint comes from."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from tests.conftest import DATA
from tests.support import same_function, truth_of

EXPECTED = np.load(DATA / "olmo_variants.npz")
IDS = np.random.default_rng(5).integers(0, 96, (2, 300))


def last_logits(model: Decoder, ids: np.ndarray, count: int) -> np.ndarray:
    tokens = torch.from_numpy(ids)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.inference_mode():
        logits, _ = model(tokens, torch.ones_like(tokens), positions, model.empty_cache(len(tokens)))
    last: np.ndarray = logits[:, -count:].numpy()
    return last


def exact_logits(folder: Path, ids: Tensor) -> Tensor:
    """The logits float64 [B, S, V] of a checkpoint."""
    model = load_checkpoint(folder).model.double()
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    with torch.inference_mode():
        logits: Tensor = model(ids, torch.ones_like(ids), positions, model.empty_cache(len(ids)))[0]
    return logits


def same_as_theirs(model: Decoder, ids: np.ndarray, wanted: np.ndarray) -> None:
    """Hold the last logits by those of the code that a checkpoint comes from."""
    count = wanted.shape[1]
    same_function(last_logits(model, ids, count), wanted, truth_of(model, ids)[:, -count:])


MARGIN = 1e-4
"""Of the logits' spread. Both sides compute in float64, of sines and cosines that are rounded to float32 and so differ
by 1e-7; a wrong reading moves logits by a hundred times the margin, which the tests make sure of."""


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.std())
