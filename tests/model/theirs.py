"""The logits of the code that a checkpoint comes from."""

import numpy as np
import torch

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


def same_as_theirs(model: Decoder, ids: np.ndarray, wanted: np.ndarray) -> None:
    """Hold the last logits by those of the code that a checkpoint comes from."""
    count = wanted.shape[1]
    same_function(last_logits(model, ids, count), wanted, truth_of(model, ids)[:, -count:])
