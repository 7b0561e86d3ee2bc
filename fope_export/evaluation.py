"""Loss on real text as a function of context length: the paper's claim, measured on any backend."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, Ids, feeds_for
from fope_export.errors import ParityError

STEP_TOKENS = 4096
"""Tokens that one step takes at most, over all rows: bounds the memory of attention and logits."""


def loss_by_length(backend: Backend, tokens: Ids, lengths: Sequence[int]) -> dict[int, float]:
    """Mean next-token loss in nats for each context length, always over the same `tokens` [N].

    The text is cut into windows of each length, so that all lengths score the same tokens (the last, incomplete window
    of the longest length is dropped) and only the context differs.

    Raises ParityError when a length does not divide the longest, or when the tokens fill no window of that.
    """
    longest = max(lengths)
    if any(longest % length for length in lengths):
        raise ParityError(f"lengths {tuple(lengths)} do not cut the same windows", hint="Use divisors of the longest.")
    usable = (len(tokens) - 1) // longest * longest
    if not usable:
        raise ParityError(f"{len(tokens)} tokens fill no window of {longest}", hint="Give more text.")
    losses = {}
    for length in lengths:
        windows = np.stack([tokens[i : i + length + 1] for i in range(0, usable, length)])
        rows = max(STEP_TOKENS // length, 1)
        parts = [_nll(backend, windows[i : i + rows]) for i in range(0, len(windows), rows)]
        losses[length] = float(np.concatenate(parts).mean())
    return losses


def _nll(backend: Backend, windows: Ids) -> NDArray[np.float64]:
    """Negative log-likelihood of each next token in windows [B, L + 1], as [B * L]."""
    logits, _ = backend.step(feeds_for(np.ascontiguousarray(windows[:, :-1])), backend.empty_cache(len(windows)))
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    nll: NDArray[np.float64] = (np.log(np.exp(logits).sum(axis=-1)) - chosen).ravel()
    return nll
