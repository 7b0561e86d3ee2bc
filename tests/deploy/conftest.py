"""A bundle that servers are started with, and what it answers alone."""

import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fope_export.backends.choose import Settings, load_backend
from fope_export.bundle import Bundle
from fope_export.deploy.run import deploy
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.serving.engine import Engine
from fope_export.shipped import shipped
from tests.deploy.lone import Lone


@pytest.fixture(autouse=True)
def _pipes() -> None:
    """The command line lets a process end that writes where nobody reads; one that tests servers must not."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model, optimized."""
    return optimize(export(shipped("fope"), tmp_path_factory.mktemp("deployed") / "small"))


@pytest.fixture(scope="session")
def folder_for(model: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that `deploy` writes for a target."""

    def folder(target: str) -> Path:
        return deploy(model, target, tmp_path_factory.mktemp(target) / "out", unvalidated=True).folder

    return folder


@pytest.fixture(scope="session")
def lone(model: Bundle) -> Iterator[Lone]:
    """Its engine, as a server with `--batch-invariant` on one thread has it."""
    backend = load_backend(model, settings=Settings(threads=1))
    with closing(backend), closing(Engine(backend, invariant=True)) as engine:
        yield Lone(model, backend, engine)
