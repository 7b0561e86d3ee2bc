"""The commands that answer: `run` a prompt, `serve` whoever asks, `deploy` for other servers."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fope_export.commands import PASSED, print_json
from fope_export.errors import ConfigError

if TYPE_CHECKING:
    from socket import socket

    from fope_export.bundle import Bundle
    from fope_export.records import AnswerRecord, DeployRecord, ServeRecord
    from fope_export.serving.host import Host
    from fope_export.serving.requests import Grammar, Handle
    from fope_export.serving.speculation import Speculation
    from fope_export.tokens import Tokenizer

LONGEST = 8192
"""Tokens of a prompt with its answer, where nobody says more."""


def run(args: argparse.Namespace) -> int:
    """Print what the bundle `args.bundle` answers to a prompt, to a file of prompts or messages, or to token ids; the
    fields of SamplingParams among `args` say how. Raises as `load_backend` and `generate_text` do, and ConfigError for
    arguments that exclude each other.
    """
    from fope_export.backends.choose import Settings, load_backend
    from fope_export.bundle import Bundle
    from fope_export.config import convert
    from fope_export.generation import generate, generate_text
    from fope_export.onnx_files import check_graphs
    from fope_export.serving.sampling import SamplingParams
    from fope_export.terminal import report_speed, waiting
    from fope_export.tokens import Tokenizer

    options = {name: getattr(args, name) for name in SamplingParams.__struct_fields__}
    sampling = convert(
        options | {"logit_bias": dict(args.logit_bias)}, SamplingParams, where="run", hint="See fope-export run --help."
    )
    _check(args)
    with waiting("loading"):
        bundle = Bundle.open(args.bundle)
        check_graphs(bundle)
        settings = Settings(optimized=args.optimized, threads=args.threads, cuda_graph=args.cuda_graph)
        backend = load_backend(bundle, _backend(args, bundle), settings)
        speculation = _speculation(args, bundle, "auto")()
    ends = bundle.manifest.decoder().ends
    if args.prompt_ids:
        steps = generate(
            backend, [_known(args.prompt_ids, bundle)], sampling, eos=ends, chunk=args.chunk,
            speculation=speculation,
        )  # fmt: skip
        _print_ids((token for _, token in steps), as_json=args.json)
        return PASSED
    prompts = [args.prompt] if args.prompt is not None else _read_prompts(args.prompts) if args.prompts else [""]
    asked, text = _asked(args, bundle, prompts), Tokenizer(bundle.path)
    handles: dict[int, Handle] = {}
    pieces = generate_text(
        backend, text, asked or prompts, sampling, stop=args.stop, eos=ends, chunk=args.chunk,
        max_batch=args.max_batch, special=not asked, grammar=_grammar(args, text, bundle),
        speculation=speculation, ended=handles.__setitem__,
    )  # fmt: skip
    texts, shown = [""] * len(prompts), InOrder(prompts, handles)
    with report_speed() as count:
        for row, piece in pieces:
            texts[row] += piece
            count(piece)
            if not args.json:
                shown.push(row, piece)
    if args.json:
        steps_of = [round(handles[row].tokens_per_step, 2) for row in range(len(prompts))]
        answers: list[AnswerRecord] = [
            {"prompt": prompt, "text": text, "tokens_per_step": tokens}
            for prompt, text, tokens in zip(prompts, texts, steps_of, strict=True)
        ]
        print_json(answers)
    else:
        shown.close()
    return PASSED


class InOrder:
    """Prints answers one after the other, each as it comes once those before it are whole."""

    def __init__(self, prompts: Sequence[str], ended: Container[int]) -> None:
        """`ended` are the rows whose answers are whole; several `prompts` are printed before their answers."""
        self._prompts, self._ended, self._waiting = prompts, ended, [""] * len(prompts)
        self._row, self._begun = 0, False

    def push(self, row: int, piece: str) -> None:
        """Take more of a row's answer."""
        self._waiting[row] += piece
        while self._row < len(self._prompts):
            self._show()
            if self._row not in self._ended:
                return
            self._next()

    def close(self) -> None:
        """All rows are whole."""
        while self._row < len(self._prompts):
            self._show()
            self._next()

    def _show(self) -> None:
        if not self._begun and len(self._prompts) > 1:
            print(f"--- {self._prompts[self._row]}")
        self._begun = True
        print(self._waiting[self._row], end="", flush=True)
        self._waiting[self._row] = ""

    def _next(self) -> None:
        print()
        self._row, self._begun = self._row + 1, False


def serve(args: argparse.Namespace) -> int:
    """Answer OpenAI's API with the bundles `args.bundles` until a signal comes. Raises as `load_backend` does, and
    BundleError for a bundle whose report is not about what is to be served.
    """
    from fope_export.documents import read_text
    from fope_export.serving.server import listen

    key = read_text(args.api_key_file, raises=ConfigError).strip() if args.api_key_file else None
    if key == "":
        raise ConfigError(f"{args.api_key_file} holds no key", hint="Write one line into it.")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    listening = listen(args.host, args.port)
    with closing(listening):
        return _answer(listening, key, args)


def deploy(args: argparse.Namespace) -> int:
    """Write a folder with which the server `args.target` answers with the bundle `args.bundle`. Raises as `deploy`."""
    from fope_export.bundle import Bundle
    from fope_export.deploy.run import deploy
    from fope_export.terminal import RESULTS, waiting

    with waiting("deploying"):
        made = deploy(
            Bundle.open(args.bundle), args.target, args.out, name=args.served_model_name, backend=args.backend,
            report=args.report, unvalidated=args.unvalidated, prompt=args.prompt, lock_timeout=args.lock_timeout,
        )  # fmt: skip
    if args.json:
        told: DeployRecord = {"target": made.target, "folder": str(made.folder), "expected": made.expected}
        print_json(told)
    else:
        RESULTS.print(f"{made.folder}: {made.expected.model} for {made.target}; its README.md says how", markup=False)
        RESULTS.print(f"next: {made.folder}/start, and beside it {made.folder}/check", markup=False)
    return PASSED


def _answer(listening: "socket", key: str | None, args: argparse.Namespace) -> int:
    from fope_export.serving.app import State
    from fope_export.serving.server import address, serve
    from fope_export.terminal import ERRORS, waiting

    with waiting("loading"):
        hosts = _hosts(args)
    url = address(listening)

    def told() -> None:
        if args.json:
            record: ServeRecord = {"url": url}
            print(json.dumps(record), flush=True)
        else:
            ERRORS.print(f"answering at {url}/v1: {', '.join(hosts)}", markup=False)

    try:
        serve(State(hosts, key), listening, drain=args.drain, origins=args.cors, told=told)
    finally:
        for host in hosts.values():
            host.close()
    return PASSED


def _hosts(args: argparse.Namespace) -> "dict[str, Host]":
    """The host of each bundle by its name, ready. Raises FopeError where one cannot be, and then none runs."""
    paths = [Path(path) for path in args.bundles]
    names = args.served_model_name or [path.resolve().name for path in paths]
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(paths)} bundles are called {', '.join(names)}", hint="Give each a name with --served-model-name."
        )
    hosts: dict[str, Host] = {}
    try:
        for name, path in zip(names, paths, strict=True):
            hosts[name] = host_of(name, path, args)
            hosts[name].start()
    except BaseException:
        for host in hosts.values():
            host.close()
        raise
    return hosts


def host_of(name: str, path: Path, args: argparse.Namespace) -> "Host":
    """A bundle as the options of `serve` say, not started yet. Raises FopeError where it may not be, or cannot be."""
    from fope_export.backends.choose import BACKENDS, Settings, choose, load_backend
    from fope_export.backends.machine import read_machine
    from fope_export.bundle import Bundle
    from fope_export.onnx_files import check_graphs
    from fope_export.serving.host import Host, Sizes
    from fope_export.validated import require_tested

    bundle = Bundle.open(path)
    check_graphs(bundle)
    backend = choose(_backend(args, bundle), read_machine(), bundle.manifest.export)
    variant = BACKENDS[backend].variant(bundle)
    if not args.unvalidated:
        require_tested(bundle, args.report, backend, variant.name, otherwise="serve it --unvalidated")
    settings = Settings(threads=args.threads)
    sizes = Sizes(
        slots=args.slots, length=args.max_model_len or min(16 * bundle.manifest.decoder().training_length, LONGEST),
        spare_bytes=args.prefix_cache, queue=args.max_queued, queued_tokens=args.max_queued_tokens, chunk=args.chunk,
        batch_invariant=args.batch_invariant, rounding=bundle.manifest.cache_rounding if variant.cache else None,
    )  # fmt: skip
    load = partial(load_backend, bundle, backend, settings, variant=variant.name)
    return Host(name, bundle, load, sizes, _speculation(args, bundle, "off"))


def _speculation(args: argparse.Namespace, bundle: "Bundle", usual: str) -> "Callable[[], Speculation | None]":
    """What says how to guess ahead, and loads the draft model, which fits the bundle. Raises ConfigError for what
    excludes itself and a draft of other tokens, and to serve a draft BundleError as for a bundle.
    """
    from fope_export.backends.choose import BACKENDS, Settings, load_backend
    from fope_export.bundle import Bundle
    from fope_export.onnx_files import check_graphs
    from fope_export.serving.drafting import require_alike
    from fope_export.serving.speculation import Speculation
    from fope_export.validated import require_tested

    chosen = args.speculate or ("auto" if args.draft else usual)
    if chosen == "off":
        if args.draft:
            raise ConfigError("--draft guesses, and --speculate off does not", hint="Leave one of them out.")
        return lambda: None
    if getattr(args, "batch_invariant", False):
        raise ConfigError(
            "--batch-invariant takes no guesses: steps of several tokens are rounded otherwise than those of one",
            hint="Leave --speculate and --draft out, or --batch-invariant.",
        )
    most = None if chosen == "auto" else int(chosen)
    if not args.draft:
        return lambda: Speculation(most)
    draft = Bundle.open(args.draft)
    check_graphs(draft)
    require_alike(bundle, draft)
    name = _backend(args, draft)
    variant = BACKENDS[name].variant(draft, optimized=getattr(args, "optimized", True))
    if not getattr(args, "unvalidated", True):
        require_tested(draft, None, name, variant.name, otherwise="serve it --unvalidated")
    settings = Settings(threads=args.threads)
    return lambda: Speculation(most, load_backend(draft, name, settings, variant=variant.name))


def _backend(args: argparse.Namespace, bundle: "Bundle") -> str:
    """What was asked for, or what is fastest here, which is told on stderr."""
    from fope_export.backends.choose import BACKENDS, fastest
    from fope_export.backends.machine import read_machine
    from fope_export.terminal import ERRORS

    if args.backend is not None:
        return str(args.backend)
    name, reasons = fastest(bundle, read_machine(), optimized=getattr(args, "optimized", True))
    if read_machine().gpus:
        ERRORS.print(f"backend {name}, {BACKENDS[name].what}" + (f" ({reasons})" if reasons else ""), markup=False)
    return name


def _known(ids: Sequence[int], bundle: "Bundle") -> Sequence[int]:
    vocabulary = bundle.manifest.decoder().vocab_size
    if max(ids) >= vocabulary:
        raise ConfigError(f"token {max(ids)} is outside the vocabulary of {vocabulary}", hint="Ids start at 0.")
    return ids


def _check(args: argparse.Namespace) -> None:
    """Before anything loads."""
    if args.system is not None and not (args.chat or args.messages):
        raise ConfigError("--system is the first message of a chat, and this is none", hint="Add --chat.")
    if args.chat and args.prompt_ids:
        raise ConfigError("--chat makes a prompt of text, and --prompt-ids gives ids", hint="Leave one of them out.")
    for option in ("stop", "json_schema", "regex", "grammar") if args.prompt_ids else ():
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} needs text, and --prompt-ids gives ids", hint="Leave one of them out.")


def _asked(args: argparse.Namespace, bundle: "Bundle", prompts: Sequence[str]) -> list[str]:
    """What the chat template makes of each prompt, or of the messages in a file; nothing without a chat."""
    if not (args.chat or args.messages):
        return []
    from fope_export.chat import Chat, read_messages

    chat = Chat(bundle.path)
    first = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.messages:
        return [chat.render([*first, *read_messages(args.messages)])]
    return [chat.render([*first, {"role": "user", "content": prompt}]) for prompt in prompts]


def _grammar(args: argparse.Namespace, text: "Tokenizer", bundle: "Bundle") -> "Callable[[], Grammar | None]":
    """What makes the grammar that an answer has to follow, if one is asked for. Raises ConfigError where it is none."""
    from fope_export.documents import read_text
    from fope_export.serving.structured import Form, Forms

    if args.regex is not None:
        form = Form("regex", args.regex)
    elif path := args.json_schema or args.grammar:
        form = Form("json_schema" if args.json_schema else "grammar", read_text(path, raises=ConfigError))
    else:
        return lambda: None
    decoder = bundle.manifest.decoder()
    return Forms(text, decoder.vocab_size, decoder.ends).follow(form).copy


def _read_prompts(path: Path) -> list[str]:
    """From a file, or "-", stdin. Lines end with a line feed alone, or with a carriage return before it: other
    separators belong to a prompt.
    """
    from fope_export.documents import decoded, read_json_lines, read_text

    hint = "One prompt a line; in a .jsonl file, one JSON string a line; in UTF-8."
    if path.suffix == ".jsonl":
        prompts = read_json_lines(path, raises=ConfigError, hint=hint)
    else:
        if path == Path("-"):
            text = decoded(sys.stdin.buffer.read(), "stdin", raises=ConfigError)
        else:
            text = read_text(path, raises=ConfigError, hint=hint)
        prompts = [line for each in text.split("\n") if (line := each.removesuffix("\r")).strip(" \t")]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"{path}: no prompts", hint=hint)
    return prompts


def _print_ids(ids: Iterable[int], *, as_json: bool) -> None:
    if as_json:
        print_json(list(ids))
        return
    for i, token in enumerate(ids):
        print(f"{',' if i else ''}{token}", end="", flush=True)
    print()
