"""What a backend is, which there are, and the choice between them."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.floating[Any]]


class Feeds(NamedTuple):
    """One step's inputs: B rows of S new tokens after a past that makes T tokens in total."""

    input_ids: Ids  # [B, S]
    attention_mask: Ids  # [B, T], 1 = token, 0 = padding on the left
    position_ids: Ids  # [B, S]

    def part(self, start: int, end: int) -> "Feeds":
        """New tokens `start` to `end` of a step without a past, as a step after the ones before them."""
        ids, mask, positions = self
        return Feeds(ids[:, start:end], mask[:, :end], positions[:, start:end])


class Backend(Protocol):
    """Runs a decoder step by step.

    Logits [B, S, V] belong to the caller. A cache belongs to the backend that made it: it is handed back unread, stays
    where the backend keeps it (host or device), and an old one remains valid after a step that grew it.
    """

    name: str
    vocab_size: int

    def empty_cache(self, batch: int) -> Any:
        """A cache of `batch` rows with no past."""
        ...

    def step(self, feeds: Feeds, cache: Any) -> tuple[Logits, Any]:
        """Logits of the new tokens, and the cache grown by them."""
        ...


def feeds_for(input_ids: Ids, attention_mask: Ids | None = None) -> Feeds:
    """Feeds for new tokens [B, S] at the end of `attention_mask` [B, T]; a row's first real token has position 0.

    Without a mask there is no past and no padding.
    """
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -input_ids.shape[1] :]
    return Feeds(input_ids, mask, np.ascontiguousarray(positions))
