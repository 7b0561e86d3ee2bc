"""Requests that share the slots of one backend: they join and leave at any step."""

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from time import monotonic, perf_counter
from typing import cast

import numpy as np

from fope_export.backends.base import CHUNK, Backend, Logits, Piece, Together, no_room
from fope_export.errors import BackendError, BusyError, ConfigError
from fope_export.serving.held import SHARED, Held
from fope_export.serving.requests import Event, Failed, Finished, Handle, Request, Token, logprobs
from fope_export.serving.sampling import sample
from fope_export.serving.speculation import Ahead, Speculation
from fope_export.serving.work import Work


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
        self._slots = backend.slots(slots, room, whole=invariant)
        self._ahead = Ahead(speculation, backend, self._slots, room) if speculation else None
        size = (backend.chunk if budget == 0 else min(backend.chunk, CHUNK)) if chunk is None else chunk
        self._chunk, self._budget = size or sys.maxsize, (size if budget is None else budget) or math.inf
        self._lock, self._closed = Lock(), False
        """Of `_waiting`, which other threads add to, and of `_closed`."""
        self._waiting: deque[Handle] = deque()
        self._working: list[Work] = []
        self._held = Held(self._slots, self._chunk, whole=invariant)
        self._told: list[Handle] = []
        """Those that something happened to since the last step."""

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
        self._held.leave(work.slot, spoilt=isinstance(event, Failed))
        self._tell(work.handle, event)

    def _fail(self, work: Work, cause: Exception) -> None:
        self.counts.failures += 1
        self._end(work, Failed(cause))

    def _admit(self) -> None:
        """Give free slots to those that wait longest."""
        free = set(range(self._slots.count)) - {work.slot for work in self._working}
        while len(self._working) < self._limit and self._waiting:
            with self._lock:  # others count those that wait
                handle = self._waiting.popleft()
            slot = self._held.choose(handle.request.prompt, free)
            free.remove(slot)
            self._working.append(Work(handle, slot))

    def _decode(self) -> list[Work]:
        """Feed every answer its newest token, alone or with guesses of what follows; whose logits are to be drawn."""
        ready = []
        for work in [work for work in self._working if work.logits is not None]:
            if (held := len(self._held.tokens[work.slot])) == self._slots.capacity:
                self._end(work, Failed(no_room("tokens", held + 1, held)))
            else:
                ready.append(work)
        guesses = self._ahead.guess(ready, self._held.tokens) if self._ahead else [[] for _ in ready]
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
            self._held.tokens[work.slot].append(work.last)
        return works

    def _look(self, work: Work, guess: Sequence[int]) -> None:
        """Feed one its newest token and guesses, and draw after each as long as the next is what was drawn."""
        assert self._ahead
        held, started = self._held.tokens[work.slot], perf_counter()
        try:
            fed = np.array([work.last, *guess], np.int64)
            logits = self._slots.prefill(work.slot, fed, len(held), last=False)
        except Exception as cause:
            self._fail(work, cause)
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
        while parts := self._next_parts(fed):
            fed += sum(map(len, parts.values()))
            whole += self._prefill(parts)
        return whole

    def _next_parts(self, fed: int) -> dict[Work, Sequence[int]]:
        """What is fed next, after so many tokens in this step: a chunk of a prompt, with more where the backend takes
        them together in as many tokens. One that may begin as another does waits for it.
        """
        parts = dict[Work, Sequence[int]]()
        for work in [work for work in self._working if work.logits is None]:
            try:
                if any(work.handle.request.prompt[:SHARED] == each.handle.request.prompt[:SHARED] for each in parts):
                    break
                chunk = self._next_chunk(work)
            except Exception as cause:
                self._fail(work, cause)
                continue
            size = sum(map(len, parts.values())) + len(chunk)
            alone = work.handle.request.prompt_logprobs is not None or not isinstance(self._slots, Together)
            if ((fed or parts) and fed + size > self._budget) or (parts and (alone or size > self._chunk)):
                break
            parts[work] = chunk
            if alone:
                break
        return parts

    def _next_chunk(self, work: Work) -> Sequence[int]:
        request = work.handle.request
        if not work.fed:
            work.fed = self._held.begin(request.prompt if request.prompt_logprobs is None else (), work.slot)
            work.handle.cached = work.fed
            self.counts.cached_tokens += work.fed
            self.counts.prompt_tokens += work.fed
        return request.prompt[work.fed : work.fed + self._chunk]

    def _prefill(self, parts: Mapping[Work, Sequence[int]]) -> list[Work]:
        """Feed these; whose prompts are whole then. If that fails, each by itself."""
        pieces = [Piece(work.slot, np.array(chunk, np.int64), work.fed) for work, chunk in parts.items()]
        try:
            if len(pieces) > 1:
                logits = cast("Together", self._slots).prefill_together(pieces)[:, None]
            else:
                last = all(work.handle.request.prompt_logprobs is None for work in parts)
                logits = self._slots.prefill(*pieces[0], last=last)[None]
        except Exception as cause:
            if len(parts) > 1:
                return [whole for part in parts.items() for whole in self._prefill(dict([part]))]
            for work in parts:
                self._fail(work, cause)
            return []
        for (work, chunk), rows in zip(parts.items(), logits, strict=True):
            try:
                self._take(work, chunk, rows)
            except Exception as cause:
                self._fail(work, cause)
        return [work for work in parts if work.logits is not None and work in self._working]

    def _take(self, work: Work, chunk: Sequence[int], logits: Logits) -> None:
        """A chunk was fed, with logits [S, V] of its tokens or of the last one."""
        request, told = work.handle.request, work.handle.request.prompt_logprobs
        self._held.put(work.slot, chunk)
        work.fed += len(chunk)
        self.counts.prompt_tokens += len(chunk)
        if told is not None:
            follow = request.prompt[work.fed - len(chunk) + 1 : work.fed + 1]
            work.handle.prompt_logprobs += [
                logprobs(row, token, told) for row, token in zip(logits, follow, strict=False)
            ]
        if work.fed == len(request.prompt):
            work.logits = logits[-1]
            if not request.sampling.max_new_tokens:
                self._end(work, Finished("length"))

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
