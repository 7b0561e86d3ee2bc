"""What is compared: token sequences, where they stand, and in which steps a backend is fed them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.exception import PolygraphyException
from polygraphy.json import from_json, save_json

from fope_export.backends.base import Backend, Feeds, Limits, empty_past, feeds_for
from fope_export.config import ModelConfig
from fope_export.documents import LISTING, read_json
from fope_export.errors import ParityError, cut
from fope_export.generation import pad_left
from fope_export.manifest import Manifest

FAR = (100_000, 1_000_000)
"""The positions that the far cases end at."""
FACTORS = (1, 2, 4, 8, 16)
"""Multiples of the training length that are compared."""
ROWS, TOKENS = 64, 256
"""Rows of a short prefill, or as many as make so many tokens: one token's error is luck, a mean over many is none."""
KEPT = 1024
"""Positions of a long case that are compared: its last ones,"""
KEPT_LOGITS = 1 << 25
"""or as many as have so many logits."""
STEP_BYTES = 1 << 30
"""Bound on the float64 logits and on the mask of one step; longer prefills are fed in chunks."""

UNLIMITED = Limits()
UNREADABLE = (
    LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, MemoryError, PolygraphyException,
)  # fmt: skip
"""What Polygraphy and NumPy raise for JSON that is none of theirs."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Case:
    """B rows of L tokens, padded on the left, fed in `steps`, `together` rows at once (0: all). The logits of the last
    `kept` positions are compared.
    """

    name: str
    feeds: Feeds
    steps: tuple[int, ...]
    kept: int
    together: int = 0

    @property
    def length(self) -> int:
        return int(self.feeds.input_ids.shape[1])

    @property
    def positions(self) -> tuple[int, int]:
        """First and last position of a token."""
        found = self.feeds.position_ids[self.feeds.attention_mask != 0]
        return int(found.min()), int(found.max())

    def run(self, backend: Backend) -> Floats:
        """Logits [N, V] of the N kept positions that hold a token, row after row."""
        rows = len(self.feeds.input_ids)
        parts = (slice(start, start + (self.together or rows)) for start in range(0, rows, self.together or rows))
        return np.concatenate([self._run(Feeds(*(array[part] for array in self.feeds)), backend) for part in parts])

    def _run(self, feeds: Feeds, backend: Backend) -> Floats:
        first = self.length - self.kept
        cache, start, kept = backend.empty_cache(len(feeds.input_ids)), 0, []
        for step in self.steps:
            logits, cache = backend.step(feeds.part(start, start + step), cache)
            kept.append(logits[:, max(first - start, 0) :])
            start += step
        compared: Floats = np.concatenate(kept, axis=1)[feeds.attention_mask[:, first:] != 0]
        return compared

    def prefilled(self, backend: Backend) -> Floats:
        """The same logits without padding and short steps: rows of a length at once, whole as far as memory allows."""
        counts = np.count_nonzero(self.feeds.attention_mask, axis=1)
        found: dict[int, Floats] = {}
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            ids, mask, positions = (array[rows, -count:] for array in self.feeds)
            case = _whole(self.name, Feeds(ids, mask, positions), backend.vocab_size, kept=min(self.kept, count))
            found |= zip(rows, case.run(backend).reshape(len(rows), case.kept, -1), strict=True)
        return np.concatenate([found[row] for row in range(len(counts))])


def standard_cases(
    config: ModelConfig, seed: int = 0, lengths: Sequence[int] = (), limits: Limits = UNLIMITED
) -> list[Case]:
    """Prefills from 1 token to 16 times the training length, or of `lengths`; a cached decode across the training
    length, uneven chunks, a padded batch that goes on decoding, and decodes that end at the FAR positions. Of
    these, the ones that a backend with `limits` has room for, as many rows at once as it takes.

    Raises ParityError for a length below 1, or where no case fits.
    """
    if any(length < 1 for length in lengths):
        raise ParityError(f"lengths {tuple(lengths)}: a prefill has at least one token", hint="Give lengths from 1.")
    trained, rng = config.training_length, np.random.default_rng(seed)

    def tokens(rows: int, length: int) -> NDArray[np.int64]:
        return rng.integers(0, config.vocab_size, (rows, length))

    def stepped(name: str, feeds: Feeds, steps: tuple[int, ...]) -> Case:
        return Case(name, feeds, steps, _kept(feeds, config.vocab_size))

    wanted = lengths or (1, 7, trained // 2 + 1, *(trained * factor for factor in FACTORS))
    decoded, first, uneven = trained + 16, max(trained - 16, 1), (trained, 7, 1, 33, trained)
    padded = feeds_for(*pad_left([list(tokens(1, n)[0]) for n in (trained // 2 + 9, trained // 4 + 1, 11)]))
    longest = padded.input_ids.shape[1]
    near = feeds_for(tokens(1, 64))
    far = {last: near._replace(position_ids=near.position_ids + last - 63) for last in FAR}
    cases = [
        *(prefill(config, length, seed) for length in sorted(set(wanted))),
        stepped(f"decode across {trained}", feeds_for(tokens(2, decoded)), (first, *[1] * (decoded - first))),
        stepped("uneven chunks", feeds_for(tokens(1, sum(uneven))), uneven),
        stepped("padded batch", padded, (longest - 8, *[1] * 8)),
        *(stepped(f"decode to {last:,}", feeds, (48, *[1] * 16)) for last, feeds in far.items()),
    ]
    if fitting := [
        replace(case, together=limits.batch or 0)
        for case in cases
        if limits.length is None or case.length <= limits.length
    ]:
        return fitting
    raise ParityError(f"there is room for no case: {limits}", hint="Give shorter --lengths, or make more room.")


def prefill(config: ModelConfig, length: int, seed: int) -> Case:
    """Rows of `length` random tokens, more of them where they are short, at once or in the largest steps that fit."""
    rows = min(-(-TOKENS // length), ROWS)
    ids = np.random.default_rng((seed, length)).integers(0, config.vocab_size, (rows, length))
    return _whole(f"prefill {length}", feeds_for(ids), config.vocab_size)


def _whole(name: str, feeds: Feeds, vocab_size: int, kept: int = 0) -> Case:
    rows, length = feeds.input_ids.shape
    largest = max(STEP_BYTES // (8 * rows * max(vocab_size, length)), 64)
    return Case(name, feeds, _chunks(length, largest), kept or _kept(feeds, vocab_size))


def _kept(feeds: Feeds, vocab_size: int) -> int:
    rows, length = feeds.input_ids.shape
    return int(min(length, KEPT, max(KEPT_LOGITS // (rows * vocab_size), 64)))


def _chunks(length: int, largest: int) -> tuple[int, ...]:
    """`length` as steps of `largest` and a rest."""
    rest = length % largest
    return (largest,) * (length // largest) + ((rest,) if rest else ())


def save_inputs(path: Path, manifest: Manifest, cases: Sequence[Case]) -> None:
    """Write the cases' whole sequences as Polygraphy's JSON, for `polygraphy run … --load-inputs` and `load_inputs`."""
    save_json([graph_feeds(manifest, case.feeds) for case in cases], str(path))


def load_inputs(path: Path, config: ModelConfig) -> list[Case]:
    """Cases from inputs that were saved, here or by Polygraphy: one a set of inputs, fed whole.

    Raises ParityError when the file is none, or when an input has a past, unknown tokens, or rows without a token.
    """
    hint = "Write them with --save-inputs."
    try:
        read_json(path, most=LISTING, raises=ParityError, hint=hint)  # holds it to bounds
        saved = from_json(path.read_text(encoding="utf-8-sig"))
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
