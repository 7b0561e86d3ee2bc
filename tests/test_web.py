"""Bundles in a browser: ONNX Runtime's WebAssembly computes their logits, and examples/web writes their text."""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.generation import generate_text
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.checkpoint import load_checkpoint
from fope_export.serving.sampling import SamplingParams
from fope_export.shipped import shipped
from fope_export.tokens import Tokenizer
from tests.browser import NEEDED, browser
from tests.support import same_function, truth_of

ORT = os.environ.get("FOPE_EXPORT_WEB", "")
PAGE = Path(__file__).parent.parent / "examples" / "web"
pytestmark = [
    pytest.mark.skipif(not ORT, reason="needs scripts/venv web"),
    NEEDED,
]
__all__ = ["browser"]

PROMPT, COUNT = "for key, value in ", 40


class Handler(SimpleHTTPRequestHandler):
    """Which says nothing."""

    def log_message(self, *_: object) -> None:
        """Of a request."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with what its README puts beside it."""
    made = Path(shutil.copytree(PAGE, tmp_path_factory.mktemp("web") / "page"))
    optimize(export(shipped("fope"), made / "model"))
    (made / "ort").symlink_to(Path(ORT).resolve() / "onnxruntime-web" / "dist")
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("file", ["model.onnx", "model.ort.onnx"])
def test_a_browser_computes_and_writes_what_the_bundle_does(
    file: str, address: str, folder: Path, browser: Browser
) -> None:
    page, failures = browser.new_page(viewport={"width": 400, "height": 800}), list[object]()
    page.on("pageerror", lambda failure: failures.append(failure))
    page.goto(f"{address}?file={file}")
    expect(page.get_by_role("status")).to_have_text("ready", timeout=60_000)

    ids = np.random.default_rng(0).integers(1, 256, (1, 24))
    steps = page.evaluate(
        "async ([first, second]) => { model.clear();"
        " return [...await model.step(first), ...await model.step(second)]; }",
        [ids[0, :16].tolist(), ids[0, 16:].tolist()],
    )
    variant = "portable" if file == "model.onnx" else "optimized"
    backend, decoder = load_backend(folder / "model", variant=variant), load_checkpoint(shipped("fope")).model
    given = slice(None) if variant == "portable" else [15, 23]  # else the last of each step
    got = np.array(steps, np.float32).reshape(1, -1, decoder.config.vocab_size)
    wanted, _ = EagerBackend(decoder).step(feeds_for(ids), EagerBackend(decoder).empty_cache(1))
    same_function(got, wanted[:, given], truth_of(decoder, ids)[:, given])

    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Tokens").fill(str(COUNT))
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("status")).to_contain_text("done", timeout=60_000)
    pieces = generate_text(backend, Tokenizer(folder / "model"), [PROMPT], SamplingParams(max_new_tokens=COUNT))
    assert page.get_by_label("Answer").text_content() == PROMPT + "".join(piece for _, piece in pieces)
    page.close()
    assert not failures
