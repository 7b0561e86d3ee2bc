"""A Dynamo worker: this folder's bundle, token ids in and out. It takes the options of `fope-export serve` that are
about a bundle, and Dynamo's own settings, as options or in the environment.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.common.backend.run import run
from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup, DynamoRuntimeConfig
from dynamo.llm.exceptions import EngineShutdown, HttpError, InvalidArgument, Unknown

from fope_export.answering import host_of
from fope_export.cli import parser
from fope_export.deploy.dynamo_requests import Answered, request_of
from fope_export.errors import BusyError, ConfigError, FopeError
from fope_export.serving.host import Host, reason_of
from fope_export.serving.protocol import RequestError, refused

BUNDLE = Path(__file__).resolve().parent / "bundle"


class Engine(LLMEngine):  # type: ignore[misc] # Dynamo is not there where types are checked
    """The bundle's engine, as Dynamo drives it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._running: dict[str, Answered] = {}
        """What is answered now, by the request's id."""

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple["Engine", WorkerConfig]:
        options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        DynamoRuntimeArgGroup().add_arguments(options)
        theirs, ours = options.parse_known_args(argv)
        config = DynamoRuntimeConfig.from_cli_args(theirs)
        args = parser().parse_args(["serve", str(BUNDLE), *ours])
        (name,) = args.served_model_name or (BUNDLE.name,)
        host = host_of(name, BUNDLE, args)
        routes = config.endpoint_types if host.chat or config.custom_jinja_template else "completions"
        return cls(host), WorkerConfig.from_runtime_config(
            config, str(BUNDLE), host.name, endpoint_types=routes, enable_kv_routing=False, enable_local_indexer=False
        )

    async def start(self, worker_id: int) -> EngineConfig:  # noqa: ARG002
        await asyncio.to_thread(self._host.start)
        sizes = LlmRegistration(context_length=self._host.length, max_num_seqs=self._host.sizes.slots)
        return EngineConfig(str(BUNDLE), self._host.name, llm=sizes)

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Tokens as they come. Usage is not told: the frontend counts what it was asked and what it told, which
        after a migration is more than what this worker saw.
        """
        answer = self._running[context.id()] = await self._submitted(request)
        try:
            async for chunk in answer.chunks():
                yield chunk
        except Exception as cause:  # of an engine that is dead, others may go on with the answer
            raise (Unknown if self._host.ready else EngineShutdown)(reason_of(cause)) from cause
        finally:
            del self._running[context.id()]
            answer.cancel()

    async def _submitted(self, request: Mapping[str, Any]) -> Answered:
        try:
            return Answered(self._host, await asyncio.to_thread(request_of, self._host, request))
        except ConfigError as cause:
            raise InvalidArgument(refused(cause).body["error"]["message"]) from cause
        except RequestError as cause:
            raise InvalidArgument(cause.body["error"]["message"]) from cause
        except BusyError as cause:
            raise HttpError(429, reason_of(cause)) from cause
        except FopeError as cause:  # not ready, or dead: others may answer
            raise EngineShutdown(reason_of(cause)) from cause

    async def abort(self, context: Any) -> None:
        if answer := self._running.get(context.id()):
            answer.cancel()

    async def cleanup(self) -> None:
        await asyncio.to_thread(self._host.close)

    async def health_check_payload(self) -> dict[str, Any]:
        payload: dict[str, Any] = build_health_check_payload(0)
        return payload


def main() -> int:
    """Until a signal comes. 2 where the bundle or the options are refused."""
    try:
        run(Engine)
    except FopeError as cause:
        print(f"worker: {reason_of(cause)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
