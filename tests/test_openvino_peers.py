"""The folder for OpenVINO as it is in OpenVINO GenAI and in optimum-intel: our tokens, alone and in ragged batches."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import load_backend
from fope_export.benchmark.contenders import ALLOWED, CONTENDERS
from fope_export.benchmark.run import BenchConfig, bench
from fope_export.bundle import Bundle
from fope_export.corpus import python_source
from fope_export.demo import shipped
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.parity.run import validate
from fope_export.report import write_parity
from fope_export.serving.sampling import SamplingParams
from fope_export.tokens import Tokenizer
from tests.support import answers

NEW = 24
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
Rows = list[list[int]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model."""
    return optimize(export(shipped("fope"), tmp_path_factory.mktemp("peers") / "out"), "openvino")


@pytest.fixture(scope="module")
def folder(bundle: Bundle) -> Path:
    return bundle.path / "openvino"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Prompts of 1 to 1,500 tokens."""
    source = python_source(held_out=True).decode()
    return [source[start : start + length] for start, length in ((0, 1), (7, 5), (100, 300), (2000, 1500))]


@pytest.fixture(scope="module")
def ours(bundle: Bundle, texts: list[str]) -> Iterator[Rows]:
    """What ONNX Runtime answers with the portable file."""
    text = Tokenizer(bundle.path)
    with closing(load_backend(bundle, variant="portable")) as backend:
        prompts = [text.encode(each) for each in texts]
        yield answers(backend, prompts, SamplingParams(max_new_tokens=NEW), eos=text.ends)


@pytest.mark.parametrize("attention", ["PA", "SDPA"])
def test_openvino_genai_gives_our_tokens(
    attention: str, bundle: Bundle, folder: Path, texts: list[str], ours: Rows
) -> None:
    """With its caches in pages, and as a state of the model; from text, which its own tokenizer reads, and from ids."""
    genai, openvino = pytest.importorskip("openvino_genai"), pytest.importorskip("openvino")
    pipeline = genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=attention, **EXACT)
    config = genai.GenerationConfig(max_new_tokens=NEW, do_sample=False)
    text = Tokenizer(bundle.path)
    wanted = [text.decode(row) for row in ours]
    assert [pipeline.generate(each, config) for each in texts] == wanted
    assert pipeline.generate(texts, config).texts == wanted  # a ragged batch
    for each, row in zip(texts, ours, strict=True):
        ids = openvino.Tensor(np.array([text.encode(each)]))
        assert list(pipeline.generate(ids, config).tokens[0]) == row


def test_openvino_genai_gives_our_tokens_in_its_own_precision(bundle: Bundle, folder: Path) -> None:
    """`LLMPipeline(folder, "CPU")`, which rounds to bfloat16 and 8 bits where it likes to: after the prompt, of twenty,
    whose answer is decided most clearly.
    """
    genai = pytest.importorskip("openvino_genai")
    source, text = python_source(held_out=True).decode(), Tokenizer(bundle.path)
    clear = dict[float, tuple[str, str]]()
    with closing(load_backend(bundle, variant="portable")) as backend:
        for start in range(0, 20 * 400, 400):
            prompt = source[start : start + 120]
            ids = text.encode(prompt)
            (answer,) = answers(backend, [ids], SamplingParams(max_new_tokens=NEW))
            logits, _ = backend.step(feeds_for(np.array([ids + answer[:-1]])), backend.empty_cache(1))
            first, second = np.sort(logits[0, len(ids) - 1 :], axis=-1)[:, [-1, -2]].T
            clear[float((first - second).min())] = prompt, text.decode(answer)
    prompt, wanted = clear[max(clear)]
    assert genai.LLMPipeline(str(folder), "CPU").generate(prompt, max_new_tokens=NEW, do_sample=False) == wanted


@pytest.mark.skipif(not (find_spec("optimum") and find_spec("optimum.intel")), reason="needs scripts/venv intel")
def test_optimum_intel_gives_our_tokens(bundle: Bundle, folder: Path, texts: list[str], ours: Rows) -> None:
    """Rows of different lengths padded on the left."""
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    model: Any = OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT)
    text, reading = Tokenizer(bundle.path), AutoTokenizer.from_pretrained(folder)
    prompts = [text.encode(each) for each in texts]
    assert [reading(each)["input_ids"] for each in texts] == prompts

    def answer(rows: Rows) -> Rows:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        new: Rows = made[:, longest:].tolist()
        return new

    assert [answer([prompt])[0] for prompt in prompts] == ours
    assert answer(prompts) == ours


@pytest.mark.skipif(not (find_spec("optimum") and find_spec("optimum.intel")), reason="needs scripts/venv intel")
def test_optimum_intels_own_export_of_a_twin_is_timed(bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "out"))
    copy = write_parity(copy, validate(copy, backend="openvino", lengths=(7,)))
    names = [name for name in CONTENDERS if name.startswith("optimum-intel")]
    config = BenchConfig(lengths=(8,), rounds=1, decoded=2, threads=2, peers=("openvino",), only=("openvino", *names))
    entries = {entry.name: entry for entry in bench(copy, config).entries if entry.name in names}
    assert entries.keys() == set(names) and not any(entry.refused for entry in entries.values())
    exact, _, four = (entries[name] for name in names)
    assert exact.away is not None and exact.away <= ALLOWED["fp32"] and four.weight_bytes < exact.weight_bytes / 3
