"""What a backend is, which there are, and the choice between them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fope_export.errors import BackendError
from fope_export.manifest import Manifest

Ids = NDArray[np.int64]
Logits = NDArray[np.floating[Any]]


CHUNK = 512
"""Tokens of a prompt that are fed at once: attention over a chunk takes less time and memory than over the whole."""


class Feeds(NamedTuple):
    """One step's inputs: B rows of S new tokens after a past that makes T tokens in total."""

    input_ids: Ids  # [B, S]
    attention_mask: Ids  # [B, T], 1 = token, 0 = padding on the left
    position_ids: Ids  # [B, S], or [B, S, A] where tokens have positions on several axes

    def part(self, start: int, end: int) -> "Feeds":
        """New tokens `start` to `end` of a step without a past, as a step after the ones before them."""
        ids, mask, positions = self
        return Feeds(ids[:, start:end], mask[:, :end], positions[:, start:end])


def no_room(what: str, size: int, room: int) -> BackendError:
    """For more rows or tokens than there is room for."""
    return BackendError(
        f"{size} {what} do not fit: there is room for {room}", hint="Ask for less, or export with a larger --capacity."
    )


class Limits(NamedTuple):
    """What a backend has room for; None is no limit."""

    batch: int | None = None
    length: int | None = None  # tokens in total, past and new

    def check(self, feeds: Feeds) -> None:
        """Raises BackendError where a step has more rows or tokens."""
        sizes = {"rows": len(feeds.input_ids), "tokens": feeds.attention_mask.shape[1]}
        for (what, size), limit in zip(sizes.items(), self, strict=True):
            if limit is not None and size > limit:
                raise no_room(what, size, limit)


class Slots(Protocol):
    """Rows of a backend with a sequence of their own each. Those that a call does not name stay as they are, and may be
    named again at any time.
    """

    count: int
    capacity: int | None
    """Tokens that fit in a row; None is no limit but memory."""

    def prefill(self, slot: int, ids: Ids, start: int, *, last: bool = True) -> Logits:
        """Put tokens [S] into a row after its first `start` ones (as many as it has, or fewer), in the place of what
        came there. Logits [S, V], or of the last token alone [1, V].

        Raises BackendError where they do not fit.
        """
        ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int] | Ids) -> Logits:
        """One more token [N] in each of some different rows, which have tokens and room; logits [N, V]."""
        ...

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Have the row `target` be the first `tokens` of `source`, another or the same, which has as many."""
        ...

    def free(self, slot: int) -> None:
        """Empty a row."""
        ...

    def close(self) -> None:
        """Give back what they took. They are not used again."""
        ...


class Piece(NamedTuple):
    """Tokens [S] of a row, after its first `start` ones."""

    slot: int
    ids: Ids
    start: int


@runtime_checkable
class Together(Protocol):
    """Slots that take tokens of several rows in one call, in less time than one row's after the other."""

    def prefill_together(self, pieces: Sequence[Piece]) -> Logits:
        """`prefill` of different rows; logits [N, V] of each row's last token. After a failure it may be called again,
        with any of these.
        """
        ...


class Backend(Protocol):
    """Runs a decoder: in slots, to serve; or step by step on caches that are passed along, as the graph is.

    It belongs to one thread at a time, with its caches and slots: nothing here may be called while another call runs.

    Logits belong to the caller. A cache belongs to the backend that made it: it is handed back unread, stays where the
    backend keeps it (host or device), and an old one remains valid after a step that grew it. (A cache that is written
    in place is one buffer: of two steps that continue from the same old one, the later wins.)
    """

    name: str
    vocab_size: int
    chunk: int
    """Tokens of a long prompt that it takes fastest."""

    def empty_cache(self, batch: int) -> Any:
        """A cache of `batch` rows with no past."""
        ...

    def step(self, feeds: Feeds, cache: Any, *, last: bool = False) -> tuple[Logits, Any]:
        """Logits [B, S, V] of the new tokens, or of the last alone, and the cache grown by them."""
        ...

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:
        """As many empty rows; `room` is a guess of how many tokens each of them will have. With `whole` a step runs all
        of them whoever is named, so that no row's numbers depend on how many others there are.

        Raises BackendError for more rows than it takes, and where it cannot run them so.
        """
        ...

    def close(self) -> None:
        """Give back memory and device. It is not used again."""
        ...


def counts_of(feeds: Feeds, lengths: Ids) -> tuple[Ids, Ids]:
    """How many of a step's new tokens are real in each row [B], and how many came before them [B].

    Raises BackendError where these are not as many as a cache has, `lengths` [B], or where padding is not on the left.
    """
    real = feeds.attention_mask[:, -feeds.input_ids.shape[1] :] != 0
    counts = np.count_nonzero(real, axis=1)
    past = np.count_nonzero(feeds.attention_mask, axis=1) - counts
    if (past != lengths).any() or (real[:, :-1] > real[:, 1:]).any():
        raise BackendError(
            "the attention mask does not fit the cache",
            hint="New tokens are padded on the left, and the mask covers the past as it was fed.",
        )
    return counts, past


def by_axis(position_ids: Ids, axes: int | None) -> Ids:
    """Positions of `Feeds` as a graph takes them: [B, S], or [A, B, S] where it has `axes`; there a token with one
    position has it on all.

    Raises BackendError for more axes than the graph has.
    """
    if axes is None and position_ids.ndim == 2:
        return position_ids
    if position_ids.ndim == 2:
        return np.broadcast_to(position_ids, (axes or 1, *position_ids.shape))
    if position_ids.shape[-1] != axes:
        raise BackendError(
            f"tokens have positions on {position_ids.shape[-1]} axes, and the graph takes {axes or 1}",
            hint="Export with --position-axes a model that has as many.",
        )
    return np.moveaxis(position_ids, -1, 0)


def for_decoder(feeds: Feeds, axes: int) -> Feeds:
    """As a decoder takes them whose tokens may have positions on as many axes: positions [B, S] or [A, B, S]. Raises
    BackendError as `by_axis` does.
    """
    positions = feeds.position_ids
    return feeds._replace(position_ids=by_axis(positions, axes if positions.ndim > 2 else None))


def axes_of(manifest: Manifest) -> int | None:
    """Axes of positions that a decoder's graph has; None where position_ids is [B, S]."""
    return manifest.decoder().spectrum.axes if manifest.export.position_axes else None


def inputs_of(manifest: Manifest, feeds: Feeds) -> dict[str, Ids]:
    """A step's feeds as the graph of a decoder takes them, by name. Raises BackendError as `by_axis` does."""
    return feeds._asdict() | {"position_ids": by_axis(feeds.position_ids, axes_of(manifest))}


def empty_past(manifest: Manifest, batch: int) -> dict[str, tuple[int, ...]]:
    """Shape of every cache input of a bundle's graph for `batch` rows with no past, by name: a static cache has all
    its slots.
    """
    return {
        port.name: tuple(
            {"batch": batch, "past_sequence": 0}[size] if isinstance(size, str) else size for size in port.shape
        )
        for port in manifest.inputs
        if port.name not in Feeds._fields
    }


def feeds_for(input_ids: Ids, attention_mask: Ids | None = None) -> Feeds:
    """Feeds for new tokens [B, S] at the end of `attention_mask` [B, T]; a row's first real token has position 0.

    Without a mask there is no past and no padding.
    """
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -input_ids.shape[1] :]
    return Feeds(input_ids, mask, np.ascontiguousarray(positions))
