"""What is asked of an engine, and what it tells."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fope_export.serving.sampling import SamplingParams


class Grammar(Protocol):
    """Follows one answer, and says what may come next."""

    done: bool
    """Whether the answer is whole, and nothing may come."""

    def allowed(self) -> NDArray[np.bool_]:
        """Of each token of the vocabulary [V], whether it may come."""
        ...

    def accept(self, token: int) -> None:
        """It came."""
        ...


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, by the model alone: before temperature, penalties and all else."""

    own: float
    top: tuple[tuple[int, float], ...]
    """Of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of an `Engine`: an answer to the token ids `prompt`, drawn as `sampling` says, up to one of the
    tokens `ends`, which belongs to it, or to `sampling.max_new_tokens` of them.

    >>> import fope_export as fx
    >>> request = fx.Request(prompt=[100, 101], sampling=fx.SamplingParams(max_new_tokens=3), ends=(10,))
    """

    prompt: Sequence[int]
    sampling: SamplingParams = SamplingParams()  # noqa: RUF009 (it is frozen)
    ends: Collection[int] = ()
    choice: int = 0
    """Tells answers to one prompt with one seed apart."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told with each token of the answer; None also leaves out its own."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, all of which are fed then."""
    deadline: float | None = None
    """When it ends, by time.monotonic()."""
    grammar: Grammar | None = None
    """What the answer has to be; it is this request's alone."""


class Token(NamedTuple):
    """The answer's next token."""

    id: int
    logprobs: Logprobs | None = None


class Finished(NamedTuple):
    """The answer is whole: with an end token or by its grammar, with as many tokens as were asked for; or it was
    cancelled, or its deadline came.
    """

    reason: Literal["stop", "length", "cancelled", "deadline"]


class Failed(NamedTuple):
    """There will be no more of the answer."""

    cause: Exception


Event = Token | Finished | Failed


class Handle:
    """A submitted request. Any thread may read what happens to it, and cancel it."""

    def __init__(self, request: Request, notify: Callable[[], None] | None = None, *, each: bool = True) -> None:
        self.request, self.cancelled, self.notify, self.each = request, False, notify, each
        self.events: SimpleQueue[Event] = SimpleQueue()
        """Tokens, then Finished or Failed."""
        self.first = 0.0
        """When its first token came, by time.monotonic()."""
        self.steps, self.right_guesses = 0, 0
        """Steps of the model after the prompt's, and tokens that one of them gave beside its own."""
        self.cached = 0
        """Tokens of the prompt that were there already; known when the first event is."""
        self.prompt_logprobs: list[Logprobs] = []
        """Of the prompt's tokens but the first, if they were asked for; known when the first event is."""

    def cancel(self) -> None:
        """It ends with the next step."""
        self.cancelled = True

    @property
    def late(self) -> bool:
        """Whether its deadline has come."""
        return self.request.deadline is not None and monotonic() >= self.request.deadline

    @property
    def tokens_per_step(self) -> float:
        """1 where nothing was guessed, or nothing right."""
        return 1 + self.right_guesses / max(self.steps, 1)

    def take(self) -> list[Event]:
        """What happened since the last call; it does not wait."""
        events: list[Event] = []
        try:
            while True:
                events.append(self.events.get_nowait())
        except Empty:
            return events


def logprobs(logits: NDArray[Any], token: int, top: int) -> Logprobs:
    """The logarithm of a token's probability by logits [V], and those of the `top` likeliest tokens."""
    relative = logits.astype(np.float64) - logits.max()
    relative -= np.log(np.exp(relative).sum())
    likeliest = np.argpartition(-relative, range(min(top, len(relative))))[:top] if top else np.zeros(0, np.intp)
    return Logprobs(float(relative[token]), tuple((int(each), float(relative[each])) for each in likeliest))
