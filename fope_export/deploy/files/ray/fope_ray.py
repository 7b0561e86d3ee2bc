"""This folder's bundle as a Ray Serve application: each replica is the server of `fope-export serve`."""

import asyncio
from pathlib import Path
from typing import Any

from ray import serve
from starlette.applications import Starlette

from fope_export.answering import host_of
from fope_export.cli import parser
from fope_export.serving.app import State, application
from fope_export.serving.host import Host, reason_of

BUNDLE = Path(__file__).resolve().parent / "bundle"


@serve.deployment
@serve.ingress()
class Model:
    """A replica."""

    async def __init__(self, options: str) -> None:  # type: ignore[misc] # Ray awaits it
        args = parser().parse_args(["serve", str(BUNDLE), *options.split()])
        (name,) = args.served_model_name or (BUNDLE.name,)
        self._host: Host = host_of(name, BUNDLE, args)
        await asyncio.to_thread(self._host.start)

    def __serve_build_asgi_app__(self) -> Starlette:
        return application(State({self._host.name: self._host}))

    async def check_health(self) -> None:
        """Raises what is wrong with the engine; Ray then replaces this replica."""
        if not self._host.ready:
            raise RuntimeError(reason_of(self._host.failure) if self._host.failure else "the engine is not ready")

    async def __del__(self) -> None:
        await asyncio.to_thread(self._host.close)


def build(args: dict[str, str]) -> Any:
    """The application; `args` has `options` of `fope-export serve` that are about a bundle."""
    return Model.bind(args["options"])  # type: ignore[attr-defined] # of the decorator
