"""A validated bundle, handed over to a server: `deploy` writes the folder that this is started from."""

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from fope_export.backends.base import Backend
from fope_export.backends.choose import BACKENDS, choose, fastest, load_backend
from fope_export.backends.machine import read_machine
from fope_export.bundle import Bundle
from fope_export.deploy import PROMPT, TARGETS
from fope_export.deploy.base import Target, check_free, check_name, write
from fope_export.documents import read_bytes
from fope_export.errors import BundleError, ConfigError
from fope_export.lock import TIMEOUT
from fope_export.manifest import REPORTS
from fope_export.onnx_files import check_graphs
from fope_export.serving.engine import Engine
from fope_export.serving.requests import Failed, Logprobs, Request, Token
from fope_export.serving.sampling import SamplingParams
from fope_export.tokens import Tokenizer
from fope_export.validated import REPORT, require_tested

TOKENS = 16
"""Of the answer that a server is checked by, at most."""
CLEAR = 0.1
"""Nats by which each of its tokens is likelier than the next: more than rounding on another machine makes up for."""
CHECK = "check.json"
"""What a folder's `check` asks and expects."""


@dataclass(frozen=True)
class Expected:
    """What a server is asked, greedily, and what it has to answer."""

    model: str
    prompt: str
    max_tokens: int
    text: str


@dataclass(frozen=True)
class Deployed:
    """A folder with which a server is started, and what that is checked by."""

    target: str
    folder: Path
    expected: Expected


def deploy(
    bundle: Bundle, target: str, out: Path, *, name: str | None = None, backend: str | None = None,
    report: Path | None = None, unvalidated: bool = False, prompt: str = PROMPT, lock_timeout: float = TIMEOUT,
) -> Deployed:  # fmt: skip
    """Write the folder `out` for a target of TARGETS: programs, settings and a copy of `bundle`, there called `name`
    (its folder's name, if None). `check` compares what the server answers to `prompt` with what `backend` (None: the
    fastest here) does now; a backend that is named is also the server's.

    Raises ConfigError for a target or name that cannot be, BundleError where `out` is not free, or a report, the
    bundle's own or that in folder `report`, does not say that this backend is right and `unvalidated` is not set, and
    BackendError where it does not run here.
    """
    if target not in TARGETS:
        raise ConfigError(f"there is no target {target!r}", hint=f"One of: {', '.join(TARGETS)}.")
    served: Target = import_module(f"fope_export.deploy.{target}").TARGET
    name = check_name(bundle.path.resolve().name if name is None else name)
    check_free(out)
    machine = read_machine()
    chosen = fastest(bundle, machine)[0] if backend is None else backend
    variant = BACKENDS[choose(chosen, machine, bundle.manifest.export)].variant(bundle)
    if not variant.files(bundle):
        raise ConfigError(f"what {chosen} runs is not in the bundle", hint="Choose another --backend, or none.")
    files = {}
    if not unvalidated:
        require_tested(bundle, report, chosen, variant.name, otherwise="deploy it --unvalidated")
        files[f"{served.bundle}/{REPORTS}{REPORT}"] = read_bytes(
            (report or bundle.path / REPORTS) / REPORT, raises=BundleError
        )
    check_graphs(bundle)
    expected = _expected(name, bundle, load_backend(bundle, chosen, variant=variant.name), prompt)
    files[CHECK] = json.dumps(vars(expected), indent=2).encode() + b"\n"
    options = ["--backend", backend] if backend else []
    values = {
        "name": name, "target": target, "version": version("fope-export"), "python": sys.executable,
        "described": bundle.manifest.export.described,
        "options": " ".join([*options, *(["--unvalidated"] if unvalidated else [])]),
    }  # fmt: skip
    write(served, bundle.path, out, values, files, lock_timeout)
    return Deployed(target, out, expected)


def _expected(name: str, bundle: Bundle, backend: Backend, prompt: str) -> Expected:
    """The beginning of the greedy answer that every machine gives. Raises what goes wrong."""
    text, ends = Tokenizer(bundle.path), bundle.manifest.decoder().ends
    engine = Engine(backend, slots=1)
    handle = engine.submit(
        Request(prompt=text.encode(prompt), sampling=SamplingParams(max_new_tokens=TOKENS), ends=ends, logprobs=2)
    )
    while engine.step():
        pass
    events = handle.take()
    engine.close()
    backend.close()
    if isinstance(failed := events[-1], Failed):
        raise failed.cause
    tokens = [event for event in events if isinstance(event, Token)]
    count = next((i for i, token in enumerate(tokens) if token.logprobs and not _is_clear(token.logprobs)), len(tokens))
    kept = [token.id for token in tokens[: max(count, 1)]]
    return Expected(name, prompt, len(kept), text.decode([token for token in kept if token not in ends]))


def _is_clear(told: Logprobs) -> bool:
    return len(told.top) < 2 or told.top[0][1] - told.top[1][1] >= CLEAR
