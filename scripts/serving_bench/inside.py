"""An engine alone, in a process of its own: inside.py BUNDLE THREADS SLOTS ROOM INVARIANT, then a task a line in."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fope_export.backends.base import Backend, Slots
from fope_export.backends.choose import Settings, load_backend
from fope_export.bundle import Bundle
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Handle, Request, Token
from fope_export.serving.sampling import SamplingParams
from fope_export.serving.structured import Following, Form, Forms
from fope_export.tokens import Tokenizer


class Watched:
    """A backend whose slots are counted on: rows that were copied, and times that all moved to a larger memory."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.copies, self.moves = backend, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def slots(self, count: int, room: int = 0, *, whole: bool = False) -> Slots:
        slots: Any = self._backend.slots(count, room, whole=whole)
        copy, reserve = slots.copy, slots._reserve

        def counted(*what: int) -> None:
            self.copies += 1
            copy(*what)

        def watched(tokens: int) -> None:
            before = slots.tensors[0]
            reserve(tokens)
            self.moves += slots.tensors[0] is not before

        slots.copy, slots._reserve = counted, watched
        made: Slots = slots
        return made


class Timed:
    """A grammar, and what it takes."""

    def __init__(self, grammar: Following, taken: list[float]) -> None:
        self._grammar, self._taken, self.done = grammar, taken, False

    def allowed(self) -> Any:
        began = time.perf_counter()
        allowed = self._grammar.allowed()
        self._taken.append(time.perf_counter() - began)
        return allowed

    def accept(self, token: int) -> None:
        began = time.perf_counter()
        self._grammar.accept(token)
        self._taken[-1] += time.perf_counter() - began
        self.done = self._grammar.done


class Inside:
    """The tasks."""

    def __init__(self, folder: str, threads: int, slots: int, room: int, invariant: int) -> None:
        bundle = Bundle.open(folder, verify=False)
        self._backend: Any = Watched(load_backend(bundle, settings=Settings(threads=threads)))
        self._new_engine = partial(Engine, self._backend, slots, room=room, invariant=bool(invariant))
        self._engine = self._new_engine()
        self._model, self._folder = bundle.manifest.decoder(), folder

    def _renew(self) -> None:
        self._engine.close()
        self._engine = self._new_engine()

    def _submit(self, prompts: Sequence[list[int]], new: int, **fields: Any) -> list[Handle]:
        sampling = SamplingParams(max_new_tokens=new)
        return [self._engine.submit(Request(prompt=prompt, sampling=sampling, **fields)) for prompt in prompts]

    def answers(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """All at once."""
        began, cpu = time.perf_counter(), time.process_time()
        handles = self._submit(prompts, new)
        while self._engine.step():
            pass
        taken = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        return taken | {"answers": [[e.id for e in handle.take() if isinstance(e, Token)] for handle in handles]}

    def arrival(self, running: list[list[int]], arriving: list[int], steps: int) -> dict[str, Any]:
        """Rows that run for `steps`, then another with a long prompt: how long steps and its chunks take alone, and
        what moved meanwhile, in an engine of its own.
        """
        self._renew()
        alone = self._submit([arriving], 1)
        chunks = [self._step() for _ in range(-(-len(arriving) // self._backend.chunk))]
        assert len(alone[0].take()) == 2
        self._renew()
        self._submit(running, 1 << 20)
        while self._engine.waiting or self._engine.counts.new_tokens < len(running):
            self._engine.step()
        decoding = [self._step() for _ in range(steps)]
        self._backend.copies = self._backend.moves = 0
        last = self._submit([arriving], 1)
        while not last[0].first:
            self._engine.step()
        moved = {"copies": self._backend.copies, "moves": self._backend.moves}
        self._renew()
        return moved | {"chunk": self._backend.chunk, "chunks": chunks, "step": statistics.median(decoding)}

    def _step(self) -> float:
        began = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - began

    def masks(self, prompts: list[list[int]], new: int, form: Sequence[str]) -> dict[str, Any]:
        """Steps of answers that have to have a form, and of such as need not: seconds of each step and of each mask."""
        forms = Forms(Tokenizer(self._folder), self._model.vocab_size, self._model.ends)
        began = time.perf_counter()
        grammar = forms.follow(Form(*form))  # type: ignore[arg-type]
        compiled, taken = time.perf_counter() - began, list[float]()
        plain = self._steps(prompts, new, lambda: None)
        masked = self._steps(prompts, new, lambda: Timed(grammar.copy(), taken))
        return {"compiled": compiled, "masks": taken, "masked": masked, "plain": plain}

    def _steps(self, prompts: list[list[int]], new: int, grammar: Callable[[], Any]) -> list[float]:
        """Those in which every answer gets a token."""
        handles = [handle for prompt in prompts for handle in self._submit([prompt], new, grammar=grammar())]
        while not all(handle.first for handle in handles):
            self._engine.step()
        steps = list[float]()
        while self._engine.running == len(prompts):
            steps.append(self._step())
        for handle in handles:
            handle.cancel()
        while self._engine.step():
            pass
        return steps


def main() -> None:
    folder, *numbers = sys.argv[1:]
    inside = Inside(folder, *map(int, numbers))
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(inside, asked.pop("do"))(**asked)), flush=True)


if __name__ == "__main__":
    main()
