"""Servers that several tests ask."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fope_export.backends.base import Backend
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.graph.optimize import optimize
from fope_export.tokens import Tokenizer
from tests.serving.served import Served, served

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def asked(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a chat template, optimized."""
    folder = Path(shutil.copytree(bundle.path, tmp_path_factory.mktemp("served") / "model"))
    optimize(Bundle.open(folder))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def server(asked: Bundle) -> Iterator[Served]:
    """It, served."""
    with served([asked.path], "--unvalidated", "--slots", "4", "--max-queued", "4", "--prefix-cache", "1M") as running:
        yield running


@pytest.fixture(scope="session")
def text(asked: Bundle) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer(asked.path)


@pytest.fixture(scope="session")
def backend(asked: Bundle) -> Backend:
    """What it runs on."""
    return load_backend(asked)
