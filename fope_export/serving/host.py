"""One bundle behind a server: its engine in a thread of its own, its tokenizer, and what it may be asked."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

from fope_export.backends.base import Backend
from fope_export.bundle import Bundle
from fope_export.chat import Chat
from fope_export.config import ModelConfig
from fope_export.dtypes import DTYPES
from fope_export.errors import BackendError, BundleError, FopeError
from fope_export.manifest import MANIFEST
from fope_export.quantizations import CacheRounding
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Failed, Handle, Request
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.speculation import Speculation
from fope_export.serving.structured import Following, Form, Forms
from fope_export.tokens import GENERATION, Tokenizer, read_object

IDLE = 0.5
"""Seconds that an idle engine sleeps at most, so that its heart is heard."""
RESERVED = 2 << 30
"""Bytes of keys and values that slots have room for from the start: none is taken before a slot is used, and what needs
more has all of them moved once.
"""
STALE = 60.0
"""Seconds without a heartbeat after which it is not alive: longer than any one call of a backend."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What a host has room for."""

    slots: int = 8
    length: int = 8192
    """Tokens of a prompt and its answer together."""
    spare_bytes: int = 0
    """Of keys and values that are kept of requests that ended."""
    queue: int | None = None
    queued_tokens: int | None = None
    chunk: int | None = None
    batch_invariant: bool = False
    rounding: CacheRounding | None = None
    """How the backend keeps keys and values, where it rounds them."""


class Host:
    """Answers requests about one bundle; any thread may call it. `load` makes its backend, in the engine's own thread,
    and `speculation` how it guesses ahead.

    Raises BundleError where the bundle has no tokenizer.
    """

    def __init__(
        self, name: str, bundle: Bundle, load: Callable[[], Backend], sizes: Sizes,
        speculation: Callable[[], Speculation | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.name, self.bundle, self._load, self.sizes = name, bundle, load, sizes
        self._speculate = speculation
        self.model = bundle.manifest.decoder()
        self.text = Tokenizer(bundle.path)
        self.chat = _chat(bundle.path)
        self.defaults = _defaults(bundle.path)
        self.created = int((bundle.path / MANIFEST).stat().st_mtime)
        self.engine: Engine | None = None
        self.failure: Exception | None = None
        """Why it is not ready, once it is known."""
        self._forms: Forms | None = None
        self._work, self._ready, self._closing = Event(), Event(), False
        self._beat = monotonic()
        self._thread = Thread(target=self._run, name=f"engine of {name}", daemon=True)

    @property
    def length(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        capacity = self.bundle.manifest.export.capacity
        return min(self.sizes.length, capacity) if capacity else self.sizes.length

    @property
    def alive(self) -> bool:
        """Whether its engine's thread does something, or waits for something to do."""
        return self._thread.is_alive() and monotonic() - self._beat < STALE

    @property
    def ready(self) -> bool:
        """Whether it has made a token since it began, or failed last."""
        return self._ready.is_set() and self.alive

    def start(self) -> None:
        """Load, and make a first token. Raises what went wrong."""
        self._thread.start()
        while not self._ready.wait(0.05):
            if not self._thread.is_alive():
                raise self.failure or BackendError(f"{self.name} did not start", hint="See the log.")

    def submit(self, request: Request, notify: Callable[[], None] | None = None, *, each: bool = True) -> Handle:
        """As `Engine.submit`. Raises BackendError also while there is no engine."""
        engine = self.engine
        if engine is None or not self.ready:
            raise BackendError(f"{self.name} is not ready", hint="Try again later.")
        handle = engine.submit(request, notify, each=each)
        self._work.set()
        return handle

    def wake(self) -> None:
        """Something was cancelled."""
        self._work.set()

    def follow(self, form: Form) -> Following:
        """A grammar for one answer. Raises ConfigError where there is none, BackendError without llguidance."""
        self._forms = self._forms or Forms(self.text, self.model.vocab_size, self.model.ends)
        return self._forms.follow(form)

    def stop(self) -> None:
        """Have what is left fail, and the thread end soon."""
        self._closing = True
        self._work.set()

    def close(self) -> None:
        """The same, and wait for it."""
        self.stop()
        self._thread.join(STALE)

    def _run(self) -> None:
        try:
            backend, speculation = self._load(), self._speculate()
        except Exception as cause:
            self.failure = cause
            return
        while not self._closing:
            try:
                self._serve(backend, speculation)
            except Exception as cause:
                log.exception("the engine of %s failed", self.name)
                self.failure = cause
                self._ready.clear()
                if self.engine is None:  # it never worked, or does not any more
                    break
        backend.close()
        if speculation and speculation.draft:
            speculation.draft.close()

    def _serve(self, backend: Backend, speculation: Speculation | None) -> None:
        """Until it is closed, or the engine fails; `engine` is None until a token was made."""
        self.engine = None
        sizes, dtype = self.sizes, self.bundle.manifest.export.dtype
        token = bytes_of_a_token(self.model, dtype, sizes.rounding)
        spare = sizes.spare_bytes // (self.length * token)
        room = min(self.length, max(RESERVED // ((sizes.slots + spare) * token), 1024))
        engine = Engine(
            backend, sizes.slots, room=room, chunk=sizes.chunk, spare=spare, queue=sizes.queue,
            queued_tokens=sizes.queued_tokens, invariant=sizes.batch_invariant,
            speculation=speculation,
        )  # fmt: skip
        try:
            _probe(engine)
            self.engine = engine
            self._ready.set()
            while not self._closing:
                if not self._step(engine):
                    self._work.wait(IDLE)
                    self._work.clear()
        except Exception as cause:
            engine.close(cause)
            raise
        engine.close(BackendError(f"{self.name} is shutting down", hint="Ask again elsewhere."))

    def _step(self, engine: Engine) -> bool:
        """Whether there is more to do. Where the backend failed, nothing is ready until it has made a token again.

        Raises what goes wrong when nobody else asks for one.
        """
        self._beat, counts = monotonic(), engine.counts
        failures, made = counts.failures, counts.new_tokens
        more = engine.step()
        if counts.failures > failures:
            self._ready.clear()
        elif counts.new_tokens > made:
            self._ready.set()
        elif not (more or self._ready.is_set()):
            _probe(engine)
            self._ready.set()
        return more


def _probe(engine: Engine) -> None:
    """Make a token of a prompt, and one of that. Raises what goes wrong."""
    handle = engine.submit(Request(prompt=[0], sampling=SamplingParams(max_new_tokens=2)))
    while engine.step():
        pass
    for event in handle.take():
        if isinstance(event, Failed):
            raise event.cause


def bytes_of_a_token(model: ModelConfig, dtype: str, rounding: CacheRounding | None = None) -> int:
    """Of its keys and values in all layers, at most."""
    row, channels = DTYPES[dtype], model.spectrum.head_dim
    head = channels * (row.widened or row).itemsize
    if rounding:
        head = channels * rounding.bits // 8 + rounding.beside
    return 2 * model.num_layers * model.num_kv_heads * head


def _chat(folder: Path) -> Chat | None:
    try:
        return Chat(folder)
    except BundleError:
        return None


def _defaults(folder: Path) -> Mapping[str, Any]:
    """What generation_config.json says about how to draw, and how much."""
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    given = read_object(folder / GENERATION)
    return {name: given[name] for name in known if isinstance(given.get(name), int | float)}


def reason_of(cause: Exception) -> str:
    """What went wrong inside, for somebody outside."""
    if not isinstance(cause, FopeError):
        return f"{type(cause).__name__} in the engine"
    return f"{cause}. {cause.hint}" if cause.hint else str(cause)
