"""Bundles in a browser: ONNX Runtime's WebAssembly computes their logits, and examples/web writes their text. And in
transformers.js, in a browser and in Node.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.generation import generate_text
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.checkpoint import load_checkpoint
from fope_export.serving.sampling import SamplingParams
from fope_export.shipped import shipped
from fope_export.tokens import Tokenizer
from tests.browser import NEEDED, browser
from tests.pages import blocks
from tests.support import same_function, truth_of

MODULES = Path(os.environ.get("FOPE_EXPORT_WEB", "")).resolve()
TRANSFORMERS = MODULES / "@huggingface" / "transformers"
PAGE = Path(__file__).parent.parent / "examples" / "web"
pytestmark = pytest.mark.skipif("FOPE_EXPORT_WEB" not in os.environ, reason="needs scripts/venv web")
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
    export(shipped("fope"), made / "model-for-transformers", ExportConfig(layout="transformers.js"))
    (made / "ort").symlink_to(MODULES / "onnxruntime-web" / "dist")
    (made / "transformers").symlink_to(TRANSFORMERS / "dist")
    (made / "ort-of-transformers").symlink_to(TRANSFORMERS / "node_modules" / "onnxruntime-web" / "dist")
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def written(bundle: Path | Bundle, prompt: str, *, portable: bool = True) -> str:
    """What `run` makes of a prompt."""
    backend = load_backend(bundle, variant="portable" if portable else "optimized")
    sampling = SamplingParams(max_new_tokens=COUNT)
    return prompt + "".join(piece for _, piece in generate_text(backend, Tokenizer(bundle), [prompt], sampling))


def told(page: Page) -> str | None:
    """What a page answers to PROMPT."""
    expect(page.get_by_role("status")).to_have_text("ready", timeout=60_000)
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Tokens").fill(str(COUNT))
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("status")).to_contain_text("done", timeout=60_000)
    return page.get_by_label("Answer").text_content()


@NEEDED
@pytest.mark.parametrize("file", ["model.onnx", "model.ort.onnx"])
def test_a_browser_computes_and_writes_what_the_bundle_does(
    file: str, address: str, folder: Path, browser: Browser
) -> None:
    page, failures = browser.new_page(viewport={"width": 400, "height": 800}), list[object]()
    page.on("pageerror", lambda failure: failures.append(failure))
    page.goto(f"{address}/index.html?file={file}")
    expect(page.get_by_role("status")).to_have_text("ready", timeout=60_000)

    ids = np.random.default_rng(0).integers(1, 256, (1, 24))
    steps = page.evaluate(
        "async ([first, second]) => { model.clear();"
        " return [...await model.step(first), ...await model.step(second)]; }",
        [ids[0, :16].tolist(), ids[0, 16:].tolist()],
    )
    variant = "portable" if file == "model.onnx" else "optimized"
    decoder = load_checkpoint(shipped("fope")).model
    given = slice(None) if variant == "portable" else [15, 23]  # else the last of each step
    got = np.array(steps, np.float32).reshape(1, -1, decoder.config.vocab_size)
    wanted, _ = EagerBackend(decoder).step(feeds_for(ids), EagerBackend(decoder).empty_cache(1))
    same_function(got, wanted[:, given], truth_of(decoder, ids)[:, given])

    assert told(page) == written(folder / "model", PROMPT, portable=variant == "portable")
    page.close()
    assert not failures


@NEEDED
def test_transformers_js_writes_in_a_browser_what_run_does(address: str, folder: Path, browser: Browser) -> None:
    page, failures = browser.new_page(viewport={"width": 400, "height": 800}), list[object]()
    page.on("pageerror", lambda failure: failures.append(failure))
    page.goto(f"{address}/transformers.html")
    assert told(page) == written(folder / "model-for-transformers", PROMPT)
    page.close()
    assert not failures


@pytest.mark.parametrize(
    "options",
    [{}, {"inline": True}, {"opset": 24}, {"dtype": "fp16"}, {"dtype": "bf16"}, {"quantize": "int4", "block": 32}],
    ids=str,
)
def test_transformers_js_writes_in_node_what_run_does(options: dict[str, Any], tmp_path: Path) -> None:
    """Texts one by one, and rows of different lengths at once."""
    bundle = export(shipped("fope"), tmp_path / "bundle", ExportConfig(**options, layout="transformers.js"))
    prompts = [PROMPT, "import os\n", "class Reader:\n    def __init__(self, path):\n"]
    given = [TRANSFORMERS / "dist" / "transformers.node.mjs", tmp_path, bundle.path.name]
    request = json.dumps({"prompts": prompts, "count": COUNT})
    command = ["node", str(Path(__file__).with_name("generate.mjs")), *map(str, given), request]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got, text = json.loads(done.stdout), Tokenizer(bundle.path)
    wanted = [written(bundle, prompt) for prompt in prompts]
    assert len({text.removeprefix(prompt) for text, prompt in zip(wanted, prompts, strict=True)}) == len(prompts)
    assert got["texts"] == wanted
    rows = [prompt + text.decode(row) for prompt, row in zip(prompts, got["rows"], strict=True)]
    assert rows == wanted


def test_the_documentations_snippet_runs(tmp_path: Path) -> None:
    (snippet,) = (block.text for block in blocks("docs/support.md") if block.language == "js")
    bundle = export(shipped("fope"), tmp_path / "web", ExportConfig(layout="transformers.js"))
    (tmp_path / "node_modules").symlink_to(MODULES)
    (tmp_path / "snippet.mjs").write_text(snippet)
    done = subprocess.run(["node", "snippet.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == (f"{written(bundle, 'def main(')}\n", 0), done.stderr
