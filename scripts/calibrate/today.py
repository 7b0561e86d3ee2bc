"""The rule before this one, to compare with: three times PyTorch's own error in the same steps, by four measures."""

import numpy as np

from fope_export.parity.judge import Floats, measure

FACTOR = 3.0
FLOOR = 8 * float(np.finfo(np.float32).eps)
"""Of the largest logit; errors below it passed."""


def shares(truth: Floats, noisy: Floats, got: Floats, allowance: float = 1.0) -> dict[str, float]:
    """What `got` has of each limit that followed from PyTorch's `noisy`; 1 is the limit. What grows with the square of
    an error counts by its root, so that a limit raised n times admits n times the error.
    """
    factor, floor = FACTOR * allowance, FLOOR * float(np.abs(truth).max())
    near_tie = np.maximum(factor * np.abs(noisy - truth).max(axis=1), floor)
    measured, own = measure(truth, got, 0.0), measure(truth, noisy, 0.0)
    relative = floor / float(np.sqrt(np.square(truth, dtype=np.float64).mean()))
    limits = {
        "max_abs": max(factor * own.max_abs, floor),
        "relative": max(factor * own.relative, relative),
        "cosine": max(factor * own.cosine**0.5, relative / 2**0.5),
        "kl": max(factor * own.kl**0.5, 2 * floor / 2**0.5),
    }
    squared = ("cosine", "kl")
    given = {name: getattr(measured, name) ** (0.5 if name in squared else 1.0) / limits[name] for name in limits}
    return given | {"flips": _flips(truth, got, near_tie)}


def _flips(truth: Floats, got: Floats, near_tie: Floats) -> float:
    """The clearest lead of a likeliest token that is another one in `got`, as a share of what a tie was."""
    rival = np.take_along_axis(truth, got.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float(((truth.max(axis=1) - rival) / (2 * near_tie)).max())
