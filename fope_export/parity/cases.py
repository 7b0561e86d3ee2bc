"""What is compared: token sequences, where they stand, and in which steps a backend is fed them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.exception import PolygraphyException
from polygraphy.json import from_json, save_json

from fope_export.backends.base import Backend, Feeds, Limits, empty_past, feeds_for
from fope_export.bundle import Manifest
from fope_export.config import ModelConfig
from fope_export.documents import LISTING, read_text
from fope_export.errors import ParityError, cut
from fope_export.generation import pad_left

FAR = (100_000, 1_000_000)
"""The positions that the far cases end at."""
FACTORS = (1, 2, 4, 8, 16)
"""Multiples of the training length that are compared."""
KEPT = 1024
"""Positions of a long case that are compared: its last ones."""
STEP_BYTES = 1 << 30
"""Bound on the float64 logits of one step; longer prefills are fed in chunks."""

UNLIMITED = Limits()
UNREADABLE = (
    LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, MemoryError, PolygraphyException,
)  # fmt: skip
"""What Polygraphy and NumPy raise for JSON that is none of theirs."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Case:
    """B rows of L tokens, padded on the left, fed in `steps`. The logits of the last `kept` positions are compared."""

    name: str
    feeds: Feeds
    steps: tuple[int, ...]
    kept: int

    @property
    def length(self) -> int:
        return int(self.feeds.input_ids.shape[1])

    def fits(self, limits: Limits) -> bool:
        """Whether there is room for it."""
        sizes = self.feeds.input_ids.shape
        return all(most is None or size <= most for size, most in zip(sizes, limits, strict=True))

    @property
    def positions(self) -> tuple[int, int]:
        """First and last position of a token."""
        found = self.feeds.position_ids[self.feeds.attention_mask != 0]
        return int(found.min()), int(found.max())

    def run(self, backend: Backend) -> Floats:
        """Logits [N, V] of the N kept positions that hold a token, row after row."""
        first = self.length - self.kept
        cache, start, kept = backend.empty_cache(len(self.feeds.input_ids)), 0, []
        for step in self.steps:
            logits, cache = backend.step(self.feeds.part(start, start + step), cache)
            kept.append(logits[:, max(first - start, 0) :])
            start += step
        compared: Floats = np.concatenate(kept, axis=1)[self.feeds.attention_mask[:, first:] != 0]
        return compared

    def run_plainly(self, backend: Backend) -> Floats:
        """The same logits without padding, batches and short steps: each row alone, whole as far as memory allows."""
        return np.concatenate([row.run(backend) for row in self._rows(_largest_step(backend.vocab_size))])

    def _rows(self, largest: int) -> Iterator["Case"]:
        for i, mask in enumerate(self.feeds.attention_mask):
            ids, _, positions = (array[i : i + 1, mask != 0] for array in self.feeds)
            length = ids.shape[1]
            feeds = Feeds(ids, np.ones_like(ids), positions)
            yield Case(self.name, feeds, _chunks(length, largest), min(self.kept, length))


def standard_cases(
    config: ModelConfig, seed: int = 0, lengths: Sequence[int] = (), limits: Limits = UNLIMITED
) -> list[Case]:
    """Prefills from 1 token to 16 times the training length, or of `lengths`; a cached decode across the training
    length, uneven chunks, a padded batch that goes on decoding, and decodes that end at the FAR positions. Of
    these, the ones that a backend with `limits` has room for.

    Raises ParityError for a length below 1, or where no case fits.
    """
    if any(length < 1 for length in lengths):
        raise ParityError(f"lengths {tuple(lengths)}: a prefill has at least one token", hint="Give lengths from 1.")
    trained, rng = config.training_length, np.random.default_rng(seed)

    def tokens(rows: int, length: int) -> NDArray[np.int64]:
        return rng.integers(0, config.vocab_size, (rows, length))

    wanted = lengths or (1, 7, trained // 2 + 1, *(trained * factor for factor in FACTORS))
    decoded, first, uneven = trained + 16, max(trained - 16, 1), (trained, 7, 1, 33, trained)
    padded = feeds_for(*pad_left([list(tokens(1, n)[0]) for n in (trained // 2 + 9, trained // 4 + 1, 11)]))
    longest = padded.input_ids.shape[1]
    near = feeds_for(tokens(1, 64))
    far = {last: near._replace(position_ids=near.position_ids + last - 63) for last in FAR}
    cases = [
        *(prefill(config, length, seed) for length in sorted(set(wanted))),
        Case(
            f"decode across {trained}",
            feeds_for(tokens(2, decoded)),
            (first, *[1] * (decoded - first)),
            min(decoded, KEPT),
        ),
        Case("uneven chunks", feeds_for(tokens(1, sum(uneven))), uneven, min(sum(uneven), KEPT)),
        Case("padded batch", padded, (longest - 8, *[1] * 8), min(longest, KEPT)),
        *(Case(f"decode to {last:,}", feeds, (48, *[1] * 16), 64) for last, feeds in far.items()),
    ]
    if fitting := [case for case in cases if case.fits(limits)]:
        return fitting
    raise ParityError(f"there is room for no case: {limits}", hint="Give shorter --lengths, or make more room.")


def prefill(config: ModelConfig, length: int, seed: int) -> Case:
    """`length` random tokens at once, or in the largest steps whose logits fit."""
    ids = np.random.default_rng((seed, length)).integers(0, config.vocab_size, (1, length))
    return _whole(f"prefill {length}", feeds_for(ids), config.vocab_size)


def _whole(name: str, feeds: Feeds, vocab_size: int) -> Case:
    length = feeds.input_ids.shape[1]
    return Case(name, feeds, _chunks(length, _largest_step(vocab_size)), min(length, KEPT))


def _chunks(length: int, largest: int) -> tuple[int, ...]:
    """`length` as steps of `largest` and a rest."""
    rest = length % largest
    return (largest,) * (length // largest) + ((rest,) if rest else ())


def _largest_step(vocab_size: int) -> int:
    return max(STEP_BYTES // (8 * vocab_size), 64)


def save_inputs(path: Path, manifest: Manifest, cases: Sequence[Case]) -> None:
    """Write the cases' whole sequences as Polygraphy's JSON, for `polygraphy run … --load-inputs` and `load_inputs`."""
    save_json([graph_feeds(manifest, case.feeds) for case in cases], str(path))


def load_inputs(path: Path, config: ModelConfig) -> list[Case]:
    """Cases from inputs that were saved, here or by Polygraphy: one a set of inputs, fed whole.

    Raises ParityError when the file is none, or when an input has a past, unknown tokens, or rows without a token.
    """
    hint = "Write them with --save-inputs."
    try:
        saved = from_json(read_text(path, most=LISTING, raises=ParityError, hint=hint))
        sets = [[np.asarray(inputs[name], np.int64) for name in Feeds._fields] for inputs in saved]
    except UNREADABLE as cause:
        raise ParityError(f"{path}: not inputs of this model: {cut(cause)}", hint=hint) from cause
    feeds = [Feeds(*arrays) for arrays in sets]
    if not feeds or any(len({array.shape for array in each}) > 1 or each.input_ids.ndim != 2 for each in feeds):
        raise ParityError(f"{path}: expected whole sequences without a past", hint=hint)
    for ids, mask, _ in feeds:
        if not ids.size or ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ParityError(f"{path}: expected token ids below {config.vocab_size}", hint=hint)
        if not mask[:, -1].all() or (np.diff((mask != 0).astype(int)) < 0).any():
            raise ParityError(f"{path}: expected padding on the left only, and a token in every row", hint=hint)
    return [_whole(f"input {i}", each, config.vocab_size) for i, each in enumerate(feeds)]


def graph_feeds(manifest: Manifest, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """`feeds` and an empty cache under the graph's input names."""
    dtype = np.float16 if manifest.export.dtype == "fp16" else np.float32  # bfloat16 runs as its float32 copy
    past = empty_past(manifest, len(feeds.input_ids))
    return feeds._asdict() | {name: np.zeros(shape, dtype) for name, shape in past.items()}
