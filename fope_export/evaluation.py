"""What the paper claims, measured on any backend: loss on real text by length of context, and passkeys found by length
and depth.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, Ids, feeds_for
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.config import Checked, Count
from fope_export.corpus import python_source
from fope_export.documents import read_bytes
from fope_export.errors import ConfigError, ParityError
from fope_export.passkey import Passkey, passkey
from fope_export.tokens import Tokenizer

STEP_TOKENS = 4096
"""Tokens that one step takes at most, over all rows: bounds the memory of attention and logits."""
MULTIPLES = (1, 2, 4, 8, 16)
"""Of the training length, unless somebody says how long contexts are."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCORED = 1 << 16
"""Tokens of text that the loss is taken on, or as many as the longest context has."""
BYTES_PER_TOKEN = 8
"""Of text that is read for each token; few tokenizers make longer ones."""
TEXT = 1 << 28
"""Bytes of a file of text at most."""
Report = Callable[[str, int, int], None]


class EvaluationConfig(Checked, frozen=True, kw_only=True):
    """What is measured: contexts of `lengths` tokens (none: 1 to 16 times the training length), `trials` passkeys at
    each length and depth, with the numbers that `seed` gives.

    >>> import fope_export as fx
    >>> fx.EvaluationConfig(lengths=(256, 512)).trials
    10
    """

    lengths: tuple[Count, ...] = ()
    trials: Count = 10
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """Passkeys at one length and depth: how many were said to the last digit, of how many."""

    length: int
    depth: float
    right: int
    of: int


@dataclass(frozen=True)
class Evaluation:
    """Of one bundle."""

    name: str
    backend: str
    trained: int
    """Tokens of a context in training."""
    losses: dict[int, float]
    """Length -> mean nats per token."""
    found: tuple[Found, ...]

    @property
    def accuracy(self) -> dict[int, float]:
        """Length -> share of the passkeys that were found, over all depths."""
        cells = {length: [each for each in self.found if each.length == length] for length in self.losses}
        return {n: sum(each.right for each in cell) / sum(each.of for each in cell) for n, cell in cells.items()}


def evaluate(
    bundle: str | Path | Bundle, config: EvaluationConfig | None = None, *, data: Path | None = None,
    backend: str | None = None, report: Report = lambda what, done, total: None,
) -> Evaluation:  # fmt: skip
    """Take a bundle's loss, and let it find passkeys, in a text: that of file `data`, or the part of Python's standard
    library that no shipped model was trained on.

    Raises ConfigError where the text is none, BundleError for a bundle without a tokenizer, ParityError where the text
    is too short for the lengths, and BackendError where the bundle does not run.

    >>> import fope_export as fx
    >>> fx.evaluate("out", fx.EvaluationConfig(lengths=(128, 256), trials=2)).losses.keys()
    dict_keys([128, 256])
    """
    made, config = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), config or EvaluationConfig()
    trained = made.manifest.decoder().training_length
    lengths = config.lengths or tuple(trained * multiple for multiple in MULTIPLES)
    tokenizer = Tokenizer(made.path)
    text = _tokens(tokenizer, data, max(SCORED, max(lengths)) + 1)
    places = [(length, depth) for length in lengths for depth in DEPTHS]
    with closing(load_backend(made, backend)) as running:
        report("loss", 0, len(places) + 1)
        losses = loss_by_length(running, text, lengths)
        found = []
        for done, (length, depth) in enumerate(places, start=1):
            report(f"passkeys in {length:,} tokens", done, len(places) + 1)
            generator = np.random.default_rng((config.seed, length, round(100 * depth)))
            tasks = (passkey(_plain(tokenizer), text, length, depth, generator) for _ in range(config.trials))
            found.append(Found(length, depth, sum(finds(running, task) for task in tasks), config.trials))
        return Evaluation(made.path.resolve().name, running.name, trained, losses, tuple(found))


def _plain(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, special=False)


def _tokens(tokenizer: Tokenizer, data: Path | None, count: int) -> Ids:
    """At most `count` tokens from the beginning of the text."""
    text = read_bytes(data, most=TEXT, raises=ConfigError) if data else python_source(held_out=True)
    try:
        decoded = text.decode() if data else text.decode(errors="ignore")
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{data} is no text in UTF-8: {cause}", hint="Give --data a file of text.") from cause
    return np.asarray(tokenizer.encode(decoded[: BYTES_PER_TOKEN * count], special=False)[:count], np.int64)


def finds(backend: Backend, task: Passkey) -> bool:
    """Whether greedy decoding says the whole key: the answer's tokens are each the likeliest after those before."""
    prompt, answer = task.prompt[None], task.answer[None]
    first, cache = backend.step(feeds_for(prompt), backend.empty_cache(1), last=True)
    said = [int(first[0, -1].argmax())]
    if answer.shape[1] > 1:
        mask = np.ones((1, prompt.shape[1] + answer.shape[1] - 1), np.int64)
        others, _ = backend.step(feeds_for(np.ascontiguousarray(answer[:, :-1]), mask), cache)
        said += others[0].argmax(axis=-1).tolist()
    return said == list(task.answer)


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
