"""Requests that share the slots of one backend: they join and leave at any step."""

import math
import sys
from collections import Counter, deque
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fope_export.backends.base import Backend, no_room
from fope_export.errors import BackendError, ConfigError
from fope_export.serving.sampling import Draw, SamplingParams, sample

SHARED = 16
"""Tokens that a prompt must begin as a slot does for these to be taken from there."""


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
        events: list[Event] = []
        try:
            while True:
                events.append(self.events.get_nowait())
        except Empty:
            return events


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
    count: int = 0
    """Tokens of the answer."""
    last: int = 0
    """The answer's newest token, which was not fed yet."""

    @cached_property
    def seen(self) -> NDArray[np.int64]:
        """The prompt's tokens, each once."""
        return np.unique(self.handle.request.prompt)

    @property
    def draw(self) -> Draw:
        request = self.handle.request
        return Draw(request.sampling, len(request.prompt) + self.count, request.choice, self.seen, self.made)


class Engine:
    """Answers many requests at once with one backend: each has a slot, and joins and leaves at any step.

    Any thread may call `submit`, and read and cancel what it returns; all else is for the thread that owns the backend.
    What a slot holds stays there when its request ends, and a prompt that begins alike does not feed it again.

    >>> import fope_export as fx
    >>> engine = fx.Engine(fx.load_backend("out"), slots=2)
    >>> handles = [engine.submit(fx.Request(prompt=[token], sampling=fx.SamplingParams(max_new_tokens=3)))
    ...            for token in (100, 101, 102)]
    >>> while engine.step():
    ...     pass
    >>> [len(handle.take()) for handle in handles]  # three tokens, and that the answer is whole
    [4, 4, 4]
    >>> engine.close()
    """

    def __init__(
        self, backend: Backend, slots: int = 8, *, room: int = 1024, chunk: int | None = None, budget: int | None = None
    ) -> None:
        """`room` is as for `Backend.slots`. `chunk` tokens of a prompt are fed at a time: 0 is all, None what suits the
        backend. A step feeds no more than `budget` tokens of prompts, or one chunk: None is a chunk's, 0 no bound.
        """
        self._backend, self._slots = backend, backend.slots(slots, room)
        size = backend.chunk if chunk is None else chunk
        self._chunk, self._budget = size or sys.maxsize, (size if budget is None else budget) or math.inf
        self._lock, self._closed = Lock(), False
        """Of `_waiting`, which other threads add to, and of `_closed`."""
        self._waiting: deque[Handle] = deque()
        self._working: list[_Work] = []
        self._held: list[list[int]] = [[] for _ in range(slots)]
        """The tokens in each slot."""
        self._left, self._leaving = [0] * slots, count(1)
        """When each slot was left: larger is later."""

    def submit(self, request: Request) -> Handle:
        """Have it answered when there is a slot for it.

        Raises ConfigError for an empty prompt, a token that there is not, in the prompt or with a bias, and a negative
        choice, and BackendError for a prompt longer than a slot, and when the engine is closed.
        """
        prompt, size, capacity = tuple(map(int, request.prompt)), self._backend.vocab_size, self._slots.capacity
        if not prompt:
            raise ConfigError("a prompt is empty", hint="Every prompt needs at least one token.")
        if outside := [token for token in prompt if not 0 <= token < size]:
            raise ConfigError(f"token {outside[0]} is outside the vocabulary of {size}", hint="Ids start at 0.")
        if request.choice < 0:
            raise ConfigError(f"choice is {request.choice}, expected 0 or more", hint="Count answers from 0.")
        if capacity is not None and len(prompt) > capacity:
            raise no_room("tokens", len(prompt), capacity)
        request.sampling.check(size)
        handle = Handle(replace(request, prompt=prompt, ends=frozenset(request.ends)))
        with self._lock:
            if self._closed:
                raise BackendError("the engine is closed", hint="Make another.")
            self._waiting.append(handle)
        return handle

    def step(self) -> bool:
        """Let requests leave and join, feed prompts, and add a token to every answer whose prompt is fed; whether there
        is more to do.
        """
        self._dismiss()
        self._admit()
        self._draw([*self._decode(), *self._feed()])
        return bool(self._working or self._waiting)

    def close(self) -> None:
        """Cancel what is left, and give the slots back."""
        with self._lock:
            self._closed = True
        for handle in (*(work.handle for work in self._working), *self._waiting):
            handle.cancel()
        self._dismiss()
        self._slots.close()

    def _dismiss(self) -> None:
        """Tell those that were cancelled."""
        for work in [work for work in self._working if work.handle.cancelled]:
            self._end(work, Finished("cancelled"))
        with self._lock:
            leaving = [handle for handle in self._waiting if handle.cancelled]
            if leaving:
                self._waiting = deque(handle for handle in self._waiting if handle not in leaving)
        for handle in leaving:
            handle.events.put(Finished("cancelled"))

    def _end(self, work: _Work, event: Finished | Failed) -> None:
        self._working.remove(work)
        self._left[work.slot] = next(self._leaving)
        if isinstance(event, Failed):  # nobody knows what it holds
            self._slots.free(work.slot)
            self._held[work.slot] = []
        work.handle.events.put(event)

    def _admit(self) -> None:
        """Give free slots to those that wait longest."""
        free = set(range(self._slots.count)) - {work.slot for work in self._working}
        while free and self._waiting:
            handle = self._waiting.popleft()
            slot = self._slot_for(handle, free)
            free.remove(slot)
            self._working.append(_Work(handle, slot))

    def _slot_for(self, handle: Handle, free: Set[int]) -> int:
        """One whose tokens are all the prompt's, else an empty one, else the one that was left first."""

        def worth(slot: int) -> tuple[bool, bool, int, int]:
            held = len(self._held[slot])
            return held > 0 and self._alike(handle, slot) == held, not held, -self._left[slot], -slot

        return max(free, key=worth)

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
        for work, row in zip(ready, logits, strict=True):
            work.logits = row
            self._held[work.slot].append(work.last)
        return ready

    def _feed(self) -> list[_Work]:
        """Feed prompts, first come first served; those that are whole now."""
        fed, whole = 0, list[_Work]()
        for work in [work for work in self._working if work.logits is None]:
            try:
                while work.logits is None:
                    chunk = self._next_chunk(work)
                    if fed and fed + len(chunk) > self._budget:
                        return whole
                    self._prefill(work, chunk)
                    fed += len(chunk)
            except Exception as cause:
                self._end(work, Failed(cause))
            else:
                whole.append(work)
        return whole

    def _next_chunk(self, work: _Work) -> Sequence[int]:
        work.fed = work.fed or self._reuse(work)
        return work.handle.request.prompt[work.fed : work.fed + self._chunk]

    def _prefill(self, work: _Work, chunk: Sequence[int]) -> None:
        (logits,) = self._slots.prefill(work.slot, np.array(chunk, np.int64), work.fed)
        work.fed += len(chunk)
        self._held[work.slot].extend(chunk)
        if work.fed == len(work.handle.request.prompt):
            work.logits = logits

    def _reuse(self, work: _Work) -> int:
        """Have the slot hold what it, or another, has of the prompt: how many tokens."""
        alike = [self._alike(work.handle, slot) for slot in range(self._slots.count)]
        source, slot = alike.index(max(alike)), work.slot
        if alike[source] > alike[slot]:
            self._slots.copy(source, slot, alike[source])
        self._held[slot] = self._held[source][: alike[source]]
        return alike[source]

    def _draw(self, ready: Sequence[_Work]) -> None:
        """The next token of all whose logits are new; if that fails, of each by itself."""
        if not ready:
            return
        try:
            logits = np.stack([work.logits for work in ready if work.logits is not None])
            tokens = sample(logits, [work.draw for work in ready])
        except Exception as cause:
            if len(ready) == 1:
                self._end(ready[0], Failed(cause))
            else:
                for work in ready:
                    self._draw([work])
            return
        for work, token in zip(ready, tokens, strict=True):
            self._tell(work, token)

    def _tell(self, work: _Work, token: int) -> None:
        request = work.handle.request
        work.last, work.count = token, work.count + 1
        work.made[token] += 1
        work.handle.events.put(Token(token))
        if token in request.ends:
            self._end(work, Finished("stop"))
        elif work.count == request.sampling.max_new_tokens:
            self._end(work, Finished("length"))
