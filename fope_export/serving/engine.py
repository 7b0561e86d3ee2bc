"""Requests that share the slots of one backend: they join and leave at any step."""

import math
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, no_room
from fope_export.errors import ConfigError
from fope_export.serving.sampling import Draw, SamplingParams, sample

SHARED = 16
"""Tokens that a prompt must begin as a slot does for these to be taken from there."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how its answer is drawn: until one of `ends`, which is part of it, or `sampling.max_new_tokens`."""

    prompt: Sequence[int]
    sampling: SamplingParams = SamplingParams()  # noqa: RUF009 (it is frozen)
    ends: Collection[int] = ()
    choice: int = 0
    """Tells answers to one prompt with one seed apart."""


class Token(NamedTuple):
    """The answer's next token."""

    id: int


class Finished(NamedTuple):
    """The answer is whole: with an end token, with as many tokens as were asked for, or it was cancelled."""

    reason: Literal["stop", "length", "cancelled"]


class Failed(NamedTuple):
    """There will be no more of the answer."""

    cause: Exception


Event = Token | Finished | Failed


class Handle:
    """A submitted request. Any thread may read what happens to it, and cancel it."""

    def __init__(self, request: Request) -> None:
        self.request, self.cancelled = request, False
        self.events: SimpleQueue[Event] = SimpleQueue()
        """Tokens, then Finished or Failed."""

    def cancel(self) -> None:
        """It ends with the next step."""
        self.cancelled = True

    def take(self) -> list[Event]:
        """What happened since the last call; it does not wait."""
        found: list[Event] = []
        try:
            while True:
                found.append(self.events.get_nowait())
        except Empty:
            return found


@dataclass
class _Work:
    """A request in a slot."""

    handle: Handle
    slot: int
    fed: int = 0
    """Tokens of its prompt that are in the slot."""
    logits: NDArray[Any] | None = None
    """[V], after the last token that was fed, once the prompt is."""
    made: Counter[int] = field(default_factory=Counter)
    """How often each token is in the answer."""
    last: int = 0
    """The answer's newest token, which was not fed yet."""

    @cached_property
    def seen(self) -> NDArray[np.int64]:
        """The prompt's tokens, each once."""
        return np.unique(self.handle.request.prompt)

    @property
    def draw(self) -> Draw:
        request, made = self.handle.request, self.made.total()
        return Draw(request.sampling, len(request.prompt) + made, request.choice, self.seen, self.made)


class Engine:
    """Owns slots of a backend. Any thread may submit; all else belongs to the thread that owns the backend.

    What a slot holds stays when its request ends, and a prompt that begins alike takes it from there.
    """

    def __init__(
        self, backend: Backend, slots: int = 8, *, room: int = 0, chunk: int | None = None, budget: int | None = None
    ) -> None:
        """`room` is as for `Backend.slots`. `chunk` tokens of a prompt are fed at a time: 0 is all, None what suits the
        backend. In one step at least one chunk is fed, and no more than `budget` tokens: None is a chunk, 0 no bound.
        """
        self._backend, self._slots = backend, backend.slots(slots, room)
        size = backend.chunk if chunk is None else chunk
        self._chunk, self._budget = size or None, (size if budget is None else budget) or math.inf
        self._waiting: deque[Handle] = deque()
        self._working: list[_Work] = []
        self._held: list[list[int]] = [[] for _ in range(slots)]
        """The tokens in each slot."""

    def submit(self, request: Request) -> Handle:
        """Have it answered when there is a slot for it.

        Raises ConfigError for an empty prompt, and for a token that there is not, in the prompt or with a bias.
        """
        if not len(request.prompt):
            raise ConfigError("a prompt is empty", hint="Every prompt needs at least one token.")
        size = self._backend.vocab_size
        if outside := [token for token in request.prompt if not 0 <= token < size]:
            raise ConfigError(f"token {outside[0]} is outside the vocabulary of {size}", hint="Ids start at 0.")
        request.sampling.check(size)
        handle = Handle(request)
        self._waiting.append(handle)
        return handle

    def step(self) -> bool:
        """Let requests leave and join, feed prompts, and add a token to every answer whose prompt is fed; whether there
        is more to do.
        """
        for work in [work for work in self._working if work.handle.cancelled]:
            self._end(work, Finished("cancelled"))
        self._admit()
        self._draw([*self._decode(), *self._feed()])
        return bool(self._working or self._waiting)

    def close(self) -> None:
        """Cancel what is left, and give the slots back."""
        for handle in (*(work.handle for work in self._working), *self._waiting):
            handle.events.put(Finished("cancelled"))
        self._working.clear()
        self._waiting.clear()
        self._slots.close()

    def _end(self, work: _Work, event: Finished | Failed) -> None:
        self._working.remove(work)
        if isinstance(event, Failed):  # nobody knows what it holds
            self._slots.free(work.slot)
            self._held[work.slot] = []
        work.handle.events.put(event)

    def _admit(self) -> None:
        """Give each free slot to whoever waits longest, one that begins alike if there is one."""
        free = set(range(self._slots.count)) - {work.slot for work in self._working}
        while free and self._waiting:
            handle = self._waiting.popleft()
            if handle.cancelled:
                handle.events.put(Finished("cancelled"))
                continue
            slot = max(free, key=lambda slot: (self._alike(handle, slot), -slot))
            free.remove(slot)
            self._working.append(_Work(handle, slot))

    def _alike(self, handle: Handle, slot: int) -> int:
        """Tokens in a slot that the prompt begins with, but for its last; few count as none."""
        prompt, held = handle.request.prompt, self._held[slot]
        longest = min(len(prompt) - 1, len(held))
        same = next((i for i in range(longest) if prompt[i] != held[i]), longest)
        return same if same >= SHARED else 0

    def _decode(self) -> list[_Work]:
        """Feed every answer its newest token; whose logits are new."""
        ready = []
        for work in [work for work in self._working if work.logits is not None]:
            if (held := len(self._held[work.slot])) == self._slots.capacity:
                self._end(work, Failed(no_room("tokens", held + 1, held)))
            else:
                ready.append(work)
        if not ready:
            return []
        try:
            logits = self._slots.decode([work.slot for work in ready], [work.last for work in ready])
        except Exception as cause:
            for work in ready:
                self._end(work, Failed(cause))
            return []
        for work, found in zip(ready, logits, strict=True):
            work.logits = found
            self._held[work.slot].append(work.last)
        return ready

    def _feed(self) -> list[_Work]:
        """Feed prompts, first come first served; those that are whole now."""
        left, whole = self._budget, []
        for work in [work for work in self._working if work.logits is None]:
            try:
                while left > 0 and work.logits is None:
                    left -= self._feed_chunk(work)
            except Exception as cause:
                self._end(work, Failed(cause))
            if work.logits is not None:
                whole.append(work)
        return whole

    def _feed_chunk(self, work: _Work) -> int:
        """How many tokens were fed."""
        if not work.fed:
            work.fed = self._reuse(work)
        prompt = work.handle.request.prompt
        chunk = prompt[work.fed :][: self._chunk]
        (logits,) = self._slots.prefill(work.slot, np.array(chunk, np.int64), work.fed)
        work.fed += len(chunk)
        self._held[work.slot].extend(chunk)
        if work.fed == len(prompt):
            work.logits = logits
        return len(chunk)

    def _reuse(self, work: _Work) -> int:
        """Have the slot hold what it, or another, has of the prompt: how many tokens."""
        alike = [self._alike(work.handle, slot) for slot in range(self._slots.count)]
        source, slot = alike.index(max(alike)), work.slot
        if alike[source] > alike[slot]:
            self._slots.copy(source, slot, alike[source])
        self._held[slot] = self._held[source][: alike[source]]
        return alike[source]

    def _draw(self, ready: Sequence[_Work]) -> None:
        """The next token of all whose logits are new."""
        if not ready:
            return
        tokens = sample(np.stack([work.logits for work in ready if work.logits is not None]), [w.draw for w in ready])
        for work, token in zip(ready, tokens, strict=True):
            work.last, request = token, work.handle.request
            work.made[token] += 1
            work.handle.events.put(Token(token))
            if token in request.ends:
                self._end(work, Finished("stop"))
            elif work.made.total() == request.sampling.max_new_tokens:
                self._end(work, Finished("length"))
