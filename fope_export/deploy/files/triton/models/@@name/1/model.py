"""The bundle beside this file, in Triton's Python backend: each request is one of the engine's, and its answer is sent
as it comes.
"""

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import triton_python_backend_utils as pb_utils

from fope_export.answering import host_of
from fope_export.cli import parser
from fope_export.deploy.triton_requests import Tensors, asked, told
from fope_export.errors import BusyError, ConfigError, FopeError
from fope_export.serving.calls import Call, calls_of_completion
from fope_export.serving.host import reason_of
from fope_export.serving.protocol import RequestError

BUNDLE = Path(__file__).resolve().parent / "bundle"
LOOK, WATCH = 0.05, 1.0
"""Seconds after which a request is looked at, whether anything came or not, and after which the engine is."""
DEAD = 70
"""The exit code of a process whose engine is dead, which no server would notice otherwise."""
log = logging.getLogger(__name__)


class Cancelled(Exception):  # noqa: N818
    """Nobody waits for the answer any more."""


class TritonPythonModel:
    """The model, as the backend drives it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load, and make a first token. Raises TritonModelException where the bundle or the options are refused."""
        options = json.loads(args["model_config"])["parameters"]["options"]["string_value"].split()
        try:
            self._host = host_of(args["model_name"], BUNDLE, parser().parse_args(["serve", str(BUNDLE), *options]))
            self._host.start()
        except FopeError as cause:
            raise pb_utils.TritonModelException(reason_of(cause)) from cause
        except SystemExit as cause:
            raise pb_utils.TritonModelException(f"options of `fope-export serve`: {options}") from cause
        self._ending, started = False, Event()
        self._thread = Thread(target=lambda: asyncio.run(self._run(started)), name="answers", daemon=True)
        self._thread.start()
        started.wait()
        self._watched = _watched()

    def is_ready(self) -> bool:
        """For servers that ask. The others are told by the end of this process, which `start` notices."""
        return self._host.ready

    def execute(self, requests: list[Any]) -> None:
        """Have them answered; nothing is waited for."""
        for request in requests:
            tensors = {each.name(): each.as_numpy() for each in request.inputs()}
            answer = self._answer(tensors, json.loads(request.parameters()), request.get_response_sender())
            asyncio.run_coroutine_threadsafe(answer, self._loop)

    def finalize(self) -> None:
        """End what is left."""
        self._ending = True
        self._host.close()
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        if self._watched:
            self._watched.close()

    async def _run(self, started: Event) -> None:
        """Answer until the end, and look after the engine."""
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        while not self._closing.is_set():
            if not (self._host.alive or self._ending):
                print(f"the engine is dead: {self._host.failure}", file=sys.stderr, flush=True)
                os._exit(DEAD)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), WATCH)
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=WATCH)

    async def _answer(self, tensors: Tensors, parameters: Mapping[str, Any], sender: Any) -> None:
        try:
            call = await asyncio.to_thread(self._understood, tensors, parameters)
            call.submit(self._loop)
            try:
                await _tell(call, sender)
            finally:
                call.cancel()
        except Cancelled:
            _refuse(sender, "cancelled", pb_utils.TritonError.CANCELLED)
        except BusyError as cause:
            _refuse(sender, reason_of(cause), pb_utils.TritonError.UNAVAILABLE)
        except (ConfigError, RequestError) as cause:
            _refuse(sender, reason_of(cause), pb_utils.TritonError.INVALID_ARG)
        except Exception as cause:
            log.exception("a request failed")
            _refuse(sender, reason_of(cause), pb_utils.TritonError.INTERNAL)

    def _understood(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Call:
        return calls_of_completion(self._host, asked(self._host.name, tensors, parameters))


async def _tell(call: Call, sender: Any) -> None:
    """Send an answer, in pieces if so asked. Raises Cancelled, and why it failed."""
    text, sent = "", 0
    while not call.over:
        with suppress(TimeoutError):
            await asyncio.wait_for(call.changed.wait(), LOOK)
        call.changed.clear()
        if sender.is_cancelled():
            raise Cancelled
        for chunk in call.take():
            choice = chunk["choices"][0]
            text += choice["text"]
            if call.asked.stream or choice["finish_reason"]:
                made = call.completion_tokens
                _send(sender, told(text, call.prompt_tokens, made - sent, choice["finish_reason"]))
                text, sent = "", made
    if call.failure:
        raise call.failure


def _send(sender: Any, tensors: Tensors) -> None:
    """The last piece says why the answer ended."""
    outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items()]
    last = bool(tensors["finish_reason"].item())
    sender.send(pb_utils.InferenceResponse(outputs), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)


def _refuse(sender: Any, why: str, code: int) -> None:
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(why, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _watched() -> socket.socket | None:
    """A connection to `start` that ends with this process, however that ends."""
    if not (path := os.environ.get("FOPE_EXPORT_WATCH")):
        return None
    watched = socket.socket(socket.AF_UNIX)
    watched.connect(path)
    return watched
