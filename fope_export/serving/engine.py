"""Requests that share the slots of one backend: they join and leave at any step."""

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from time import monotonic, perf_counter

import numpy as np

from fope_export.backends.base import CHUNK, Backend, no_room
from fope_export.errors import BackendError, BusyError, ConfigError
from fope_export.serving.requests import Event, Failed, Finished, Handle, Request, Token, logprobs
from fope_export.serving.sampling import sample
from fope_export.serving.speculation import Ahead, Speculation
from fope_export.serving.work import Work

SHARED = 16
"""Tokens that a prompt must begin as a slot does for these to be taken from there."""


@dataclass
class Counts:
    """What an engine has done."""

    prompt_tokens: int = 0
    """Fed or taken from a slot."""
    cached_tokens: int = 0
    """Those that were taken from a slot."""
    new_tokens: int = 0
    looks: int = 0
    """Steps of one answer that looked at guesses."""
    guesses: int = 0
    right_guesses: int = 0
    """Those that were drawn."""
    failures: int = 0
    """Calls of the backend that failed."""


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
        self, backend: Backend, slots: int = 8, *, room: int = 1024, chunk: int | None = None,
        budget: int | None = None, spare: int = 0, queue: int | None = None, queued_tokens: int | None = None,
        invariant: bool = False, speculation: Speculation | None = None,
    ) -> None:  # fmt: skip
        """`slots` requests are answered at once, and as many more rows as `spare` says keep what ended ones held.
        `room` is as for `Backend.slots`. `chunk` tokens of a prompt are fed at a time: 0 is all, None what suits the
        backend, but CHUNK at most where a step is bounded, as others wait for it. A step feeds no more than `budget`
        tokens of prompts, or one chunk: None is a chunk's, 0 no bound. `queue` requests may wait, with `queued_tokens`
        in their prompts together; None is no bound. With `invariant` a request is answered bit for bit alike whatever
        runs beside it and was asked before: every step runs all rows, and of a prompt that was there only whole chunks
        are taken. `speculation` is how it guesses ahead, None not at all.

        Raises ConfigError for guesses with `invariant`: several tokens of a row are rounded otherwise than one.
        """
        if invariant and speculation:
            raise ConfigError(
                "guesses are looked at in steps of several tokens, which are rounded otherwise than those of one",
                hint="Leave --speculate and --draft out, or --batch-invariant.",
            )
        self.counts = Counts()
        self._backend, self._limit, self._queue = backend, slots, (queue, queued_tokens)
        slots += spare
        self._slots, self._invariant = backend.slots(slots, room, whole=invariant), invariant
        self._ahead = Ahead(speculation, backend, self._slots, room) if speculation else None
        size = (backend.chunk if budget == 0 else min(backend.chunk, CHUNK)) if chunk is None else chunk
        self._chunk, self._budget = size or sys.maxsize, (size if budget is None else budget) or math.inf
        self._lock, self._closed = Lock(), False
        """Of `_waiting`, which other threads add to, and of `_closed`."""
        self._waiting: deque[Handle] = deque()
        self._working: list[Work] = []
        self._held: list[list[int]] = [[] for _ in range(slots)]
        """The tokens in each slot."""
        self._fed = [0] * slots
        """How many of these came in whole chunks from the first on."""
        self._told: list[Handle] = []
        """Those that something happened to since the last step."""
        self._left, self._leaving = [0] * slots, count(1)
        """When each slot was left: larger is later."""

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._working)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def submit(self, request: Request, notify: Callable[[], None] | None = None, *, each: bool = True) -> Handle:
        """Have it answered when there is a slot for it. `notify` is called by the engine's thread after a step in which
        something happened to it, or without `each` when it is over.

        Raises ConfigError for an empty prompt, a token that there is not, in the prompt or with a bias, and a negative
        choice, BackendError for a prompt longer than a slot, and when the engine is closed, and BusyError when too many
        wait.
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
        handle = Handle(replace(request, prompt=prompt, ends=frozenset(request.ends)), notify, each=each)
        with self._lock:
            if self._closed:
                raise BackendError("the engine is closed", hint="Make another.")
            self._check_queue(len(prompt))
            self._waiting.append(handle)
        return handle

    def _check_queue(self, tokens: int) -> None:
        """Raises BusyError where one more request with as many tokens may not wait."""
        waiting = [len(handle.request.prompt) for handle in self._waiting]
        requests, limit = self._queue
        free = self._limit - len(self._working)
        sizes = (
            ("requests", len(waiting) + 1 - free, requests),
            ("tokens of prompts", sum(waiting[free:]) + tokens, limit),
        )
        for what, size, most in sizes:
            if most is not None and size > most and len(waiting) >= free:
                raise BusyError(f"{size} {what} would wait, and {most} may", hint="Try again later.")

    def step(self) -> bool:
        """Let requests leave and join, feed prompts, and add a token to every answer whose prompt is fed; whether there
        is more to do.
        """
        self._dismiss()
        self._admit()
        self._draw([*self._decode(), *self._feed()])
        self._notify()
        return bool(self._working or self._waiting)

    def _notify(self) -> None:
        told, self._told = dict.fromkeys(self._told), []
        for handle in told:
            if handle.notify:
                handle.notify()

    def _tell(self, handle: Handle, event: Event) -> None:
        handle.events.put(event)
        if handle.each or not isinstance(event, Token):
            self._told.append(handle)

    def close(self, cause: Exception | None = None) -> None:
        """End what is left, cancelled or failed for a `cause`, and give the slots back."""
        with self._lock:
            self._closed = True
            left = [*(work.handle for work in self._working), *self._waiting]
            self._waiting.clear()
        self._working.clear()
        for handle in left:
            self._tell(handle, Failed(cause) if cause else Finished("cancelled"))
        self._notify()
        self._slots.close()
        if self._ahead:
            self._ahead.close()

    def _dismiss(self) -> None:
        """Tell those that were cancelled, or whose deadline came."""
        for work in [work for work in self._working if work.handle.cancelled or work.handle.late]:
            self._end(work, Finished("cancelled" if work.handle.cancelled else "deadline"))
        with self._lock:
            leaving = [handle for handle in self._waiting if handle.cancelled or handle.late]
            if leaving:
                self._waiting = deque(handle for handle in self._waiting if handle not in leaving)
        for handle in leaving:
            self._tell(handle, Finished("cancelled" if handle.cancelled else "deadline"))

    def _end(self, work: Work, event: Finished | Failed) -> None:
        self._working.remove(work)
        self._left[work.slot] = next(self._leaving)
        if isinstance(event, Failed):  # nobody knows what it holds
            self._slots.free(work.slot)
            self._held[work.slot], self._fed[work.slot] = [], 0
        self._tell(work.handle, event)

    def _admit(self) -> None:
        """Give free slots to those that wait longest."""
        free = set(range(self._slots.count)) - {work.slot for work in self._working}
        while len(self._working) < self._limit and self._waiting:
            with self._lock:  # others count those that wait
                handle = self._waiting.popleft()
            slot = self._slot_for(handle, free)
            free.remove(slot)
            self._working.append(Work(handle, slot))

    def _slot_for(self, handle: Handle, free: Set[int]) -> int:
        """One whose tokens are all the prompt's, else an empty one, else the one that was left first."""

        def worth(slot: int) -> tuple[bool, bool, int, int]:
            held = len(self._held[slot])
            return held > 0 and self._alike(handle, slot) == held, not held, -self._left[slot], -slot

        return max(free, key=worth)

    def _alike(self, handle: Handle, slot: int) -> int:
        """Tokens in a slot that the prompt begins with, but for its last, and may be taken; few count as none."""
        prompt, held = handle.request.prompt, self._held[slot]
        longest = min(len(prompt) - 1, len(held))
        same = next((i for i in range(longest) if prompt[i] != held[i]), longest)
        if self._invariant:
            same = min(same, self._fed[slot]) // self._chunk * self._chunk
        return same if same >= SHARED else 0

    def _decode(self) -> list[Work]:
        """Feed every answer its newest token, alone or with guesses of what follows; whose logits are to be drawn."""
        ready = []
        for work in [work for work in self._working if work.logits is not None]:
            if (held := len(self._held[work.slot])) == self._slots.capacity:
                self._end(work, Failed(no_room("tokens", held + 1, held)))
            else:
                ready.append(work)
        guesses = self._ahead.guess(ready, self._held) if self._ahead else [[] for _ in ready]
        stepped = self._step([work for work, guess in zip(ready, guesses, strict=True) if not guess])
        for work, guess in zip(ready, guesses, strict=True):
            if guess:
                self._look(work, guess)
        return stepped

    def _step(self, works: list[Work]) -> list[Work]:
        """Feed these their newest tokens together; none where that fails."""
        if not works:
            return []
        started = perf_counter()
        try:
            logits = self._slots.decode([work.slot for work in works], [work.last for work in works])
        except Exception as cause:
            self.counts.failures += 1
            for work in works:
                self._end(work, Failed(cause))
            return []
        if self._ahead:
            self._ahead.stepped(len(works), perf_counter() - started)
        for work, row in zip(works, logits, strict=True):
            work.logits = row
            work.handle.steps += 1
            self._held[work.slot].append(work.last)
        return works

    def _look(self, work: Work, guess: Sequence[int]) -> None:
        """Feed one its newest token and guesses, and draw after each as long as the next is what was drawn."""
        assert self._ahead
        held, started = self._held[work.slot], perf_counter()
        try:
            fed = np.array([work.last, *guess], np.int64)
            logits = self._slots.prefill(work.slot, fed, len(held), last=False)
        except Exception as cause:
            self.counts.failures += 1
            self._end(work, Failed(cause))
            return
        seconds, before = perf_counter() - started, len(held)
        work.handle.steps += 1
        for row, token in zip(logits, fed, strict=True):
            if work not in self._working or work.last != token:
                break
            held.append(work.last)
            work.logits = row
            self._draw([work])
        right, started = len(held) - before - 1, perf_counter()
        if right < len(guess) and work in self._working:
            self._slots.copy(work.slot, work.slot, len(held))
        self.counts.looks, self.counts.guesses = self.counts.looks + 1, self.counts.guesses + len(guess)
        self.counts.right_guesses += right
        work.handle.right_guesses += right
        self._ahead.looked(work, len(guess), right, seconds + perf_counter() - started)

    def _feed(self) -> list[Work]:
        """Feed prompts, first come first served; those that are whole now."""
        fed, whole = 0, list[Work]()
        for work in [work for work in self._working if work.logits is None]:
            try:
                while work.logits is None:
                    chunk = self._next_chunk(work)
                    if fed and fed + len(chunk) > self._budget:
                        return whole
                    self._prefill(work, chunk)
                    fed += len(chunk)
            except Exception as cause:
                self.counts.failures += 1
                self._end(work, Failed(cause))
            else:
                if work.handle.request.sampling.max_new_tokens:
                    whole.append(work)
                else:
                    self._end(work, Finished("length"))
        return whole

    def _next_chunk(self, work: Work) -> Sequence[int]:
        if not work.fed and work.handle.request.prompt_logprobs is None:
            work.fed = work.handle.cached = self._reuse(work)
            self.counts.cached_tokens += work.fed
            self.counts.prompt_tokens += work.fed
        return work.handle.request.prompt[work.fed : work.fed + self._chunk]

    def _prefill(self, work: Work, chunk: Sequence[int]) -> None:
        request, ids = work.handle.request, np.array(chunk, np.int64)
        if not work.fed:
            self._held[work.slot], self._fed[work.slot] = [], 0
        told = request.prompt_logprobs
        logits = self._slots.prefill(work.slot, ids, work.fed, last=told is None)
        work.fed += len(chunk)
        self.counts.prompt_tokens += len(chunk)
        if len(chunk) == self._chunk and self._fed[work.slot] == work.fed - len(chunk):
            self._fed[work.slot] = work.fed
        self._held[work.slot].extend(chunk)
        if told is not None:
            follow = request.prompt[work.fed - len(chunk) + 1 : work.fed + 1]
            work.handle.prompt_logprobs += [
                logprobs(row, token, told) for row, token in zip(logits, follow, strict=False)
            ]
        if work.fed == len(request.prompt):
            work.logits = logits[-1]

    def _reuse(self, work: Work) -> int:
        """Have the slot hold what it, or another, has of the prompt: how many tokens."""
        alike = [self._alike(work.handle, slot) for slot in range(self._slots.count)]
        source, slot = alike.index(max(alike)), work.slot
        if alike[source] > alike[slot]:
            self._slots.copy(source, slot, alike[source])
        self._held[slot], self._fed[slot] = self._held[source][: alike[source]], min(self._fed[source], alike[source])
        return alike[source]

    def _draw(self, ready: Sequence[Work]) -> None:
        """The next token of all whose logits are new; if that fails, of each by itself."""
        if not ready:
            return
        try:
            logits = np.stack([work.logits for work in ready if work.logits is not None])
            tokens = sample(logits, [work.draw(logits.shape[1]) for work in ready])
        except Exception as cause:
            if len(ready) == 1:
                self._end(ready[0], Failed(cause))
            else:
                for work in ready:
                    self._draw([work])
            return
        for work, token in zip(ready, tokens, strict=True):
            self._add(work, token)

    def _add(self, work: Work, token: int) -> None:
        request = work.handle.request
        assert work.logits is not None
        told = None if request.logprobs is None else logprobs(work.logits, token, request.logprobs)
        work.last, work.count = token, work.count + 1
        work.made[token] += 1
        work.handle.first = work.handle.first or monotonic()
        self.counts.new_tokens += 1
        self._tell(work.handle, Token(token, told))
        if request.grammar:
            request.grammar.accept(token)
        if token in request.ends or (request.grammar and request.grammar.done):
            self._end(work, Finished("stop"))
        elif work.count == request.sampling.max_new_tokens:
            self._end(work, Finished("length"))
