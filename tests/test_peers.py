"""The bundle as it is in ONNX Runtime GenAI and in Optimum: the same tokens, alone, streamed, and in ragged batches."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fope_export.backends.base import Backend
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.serving.sampling import SamplingParams
from fope_export.shipped import shipped
from fope_export.tokens import Tokenizer
from tests.support import answers

genai = pytest.importorskip("onnxruntime_genai", reason="needs fope-export[peers]")
optimum = pytest.importorskip("optimum.onnxruntime", reason="needs fope-export[peers]")
transformers = pytest.importorskip("transformers", reason="needs fope-export[peers]")

TEXTS = ("def ", "class Reader(object):\n    def __init__(self, path):\n", "x", "import os\0# Ω\n")
PROMPTS = [list(text.encode()) for text in TEXTS]  # the last holds the token that also pads and ends
NEW = 24
KINDS = {
    "fp32": ExportConfig(),
    "fp16": ExportConfig(dtype="fp16"),
    "int4": ExportConfig(quantize="int4"),
    "folded": ExportConfig(fold_padding=True),
    "inlined": ExportConfig(inline=True),
    "transformers.js": ExportConfig(layout="transformers.js"),
    "optimized": ExportConfig(),
    "optimized int4": ExportConfig(quantize="int4"),
}
STATIC = {"static": ExportConfig(cache="static", capacity=200)}
Rows = list[list[int]]
Run = Callable[[Bundle, Rows], Rows]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The shipped model, exported in every way."""
    folder = tmp_path_factory.mktemp("peers")
    made = {kind: export(shipped("fope"), folder / kind, config) for kind, config in (KINDS | STATIC).items()}
    return made | {kind: optimize(made[kind]) for kind in KINDS if kind.startswith("optimized")}


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One whose text ends with the line."""
    folder = Path(shutil.copytree(shipped("fope"), tmp_path_factory.mktemp("ending") / "checkpoint"))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": ord("\n")}
    (folder / "config.json").write_text(json.dumps(config))
    return export(folder, folder.parent / "bundle")


def ours(backend: Backend, prompts: Rows, eos: int | None = None) -> Rows:
    return answers(backend, prompts, SamplingParams(max_new_tokens=NEW), eos=eos)


def in_genai(bundle: Bundle, prompts: Rows) -> Rows:
    """Token by token, rows of different lengths padded on the right, as GenAI's own tokenizer does it."""
    model = genai.Model(str(bundle.path))
    params = genai.GeneratorParams(model)
    longest = max(map(len, prompts))
    params.set_search_options(batch_size=len(prompts), max_length=longest + NEW, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([row + [0] * (longest - len(row)) for row in prompts], np.int32))
    steps = []
    while not generator.is_done():
        generator.generate_next_token()
        steps.append(generator.get_next_tokens().tolist())
    return [list(row) for row in zip(*steps, strict=True)]


def in_optimum(bundle: Bundle, prompts: Rows) -> Rows:
    """Rows of different lengths padded on the left."""
    model = optimum.ORTModelForCausalLM.from_pretrained(bundle.path)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    rows = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    answers: Rows = rows[:, longest:].tolist()
    return answers


def check(bundle: Bundle, run: Run) -> None:
    backend = load_backend(bundle)
    alone = [ours(backend, [prompt])[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in alone}) == len(PROMPTS), "prompts that answer alike would prove little"
    assert [run(bundle, [prompt])[0] for prompt in PROMPTS] == alone
    assert run(bundle, PROMPTS) == alone == ours(backend, PROMPTS)


@pytest.mark.parametrize("kind", KINDS | STATIC)
def test_genai_gives_our_tokens(kind: str, bundles: dict[str, Bundle]) -> None:
    check(bundles[kind], in_genai)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "optimized int4"])  # it takes the portable file
def test_optimum_gives_our_tokens(kind: str, bundles: dict[str, Bundle]) -> None:
    check(bundles[kind], in_optimum)


@pytest.mark.parametrize("run", [in_genai, in_optimum])
def test_a_row_that_ends_leaves_the_others_alone(run: Run, ending: Bundle) -> None:
    eos, pad = ord("\n"), 0
    want = ours(load_backend(ending), PROMPTS, eos)
    assert len({len(row) for row in want}) > 1, "some rows must end before others"
    got = run(ending, PROMPTS)
    assert [row[: len(wanted)] for row, wanted in zip(got, want, strict=True)] == want
    for row, wanted in zip(got, want, strict=True):
        assert set(row[len(wanted) :]) <= {pad, eos}


def test_optimum_refuses_a_static_cache(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(Exception, match="invalid dimensions"):
        in_optimum(bundles["static"], PROMPTS[:1])


def test_genai_goes_on_after_its_own_answer_only_with_all_tokens(bundles: dict[str, Bundle]) -> None:
    """GenAI does not feed the last token that it gave before new ones: the graph refuses what would be wrong."""
    params = genai.GeneratorParams(model := genai.Model(str(bundles["fp32"].path)))
    params.set_search_options(max_length=100, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([PROMPTS[0]], np.int32))
    generator.generate_next_token()
    with pytest.raises(RuntimeError, match="shape"):
        generator.append_tokens(np.array([PROMPTS[1]], np.int32))


def test_genai_reads_and_writes_text(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["fp32"]
    tokenizer = genai.Tokenizer(genai.Model(str(bundle.path)))
    text = "def é():\n\tΩ  return 'x'\r\n"
    ids = tokenizer.encode(text)
    assert ids.tolist() == Tokenizer(bundle.path).encode(text) and tokenizer.decode(ids) == text
    stream = tokenizer.create_stream()
    assert "".join(stream.decode(token) for token in ids) == text
    # What GenAI pads by itself is what `in_genai` feeds.
    padded = tokenizer.encode_batch(list(TEXTS[:2])).as_numpy()
    assert padded.tolist() == [PROMPTS[0] + [0] * (len(PROMPTS[1]) - len(PROMPTS[0])), PROMPTS[1]]


def test_transformers_reads_and_writes_text(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["fp32"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle.path)
    text = "def é():\n\tΩ  return 'x' . \r\n"
    ids = tokenizer(text).input_ids
    assert ids == Tokenizer(bundle.path).encode(text) and tokenizer.decode(ids) == text
    model = optimum.ORTModelForCausalLM.from_pretrained(bundle.path)
    with pytest.raises(ValueError, match="padding token"):
        tokenizer(list(TEXTS), padding=True)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    fed = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    told = tokenizer.batch_decode(
        model.generate(**fed, max_new_tokens=NEW, do_sample=False)[:, fed.input_ids.shape[1] :]
    )
    backend = load_backend(bundle)
    assert [list(text.encode()) for text in told] == [ours(backend, [prompt])[0] for prompt in PROMPTS]


def test_the_checkpoints_own_description_of_its_tokenizer_stays(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(shipped("fope"), tmp_path / "checkpoint"))
    own = '{"tokenizer_class": "GPT2Tokenizer"}'
    (checkpoint / "tokenizer_config.json").write_text(own)
    bundle = export(checkpoint, tmp_path / "out")
    assert (bundle.path / "tokenizer_config.json").read_text() == own


def test_special_tokens_are_named_and_ordinary_ones_are_not(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(shipped("fope"), tmp_path / "checkpoint"))
    plain = export(checkpoint, tmp_path / "plain")
    assert "pad_token" not in json.loads((plain.path / "tokenizer_config.json").read_text())
    text = Tokenizer(checkpoint)
    text.tokenizer.add_special_tokens([text.tokenizer.id_to_token(0)])
    text.tokenizer.save(str(checkpoint / "tokenizer.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(checkpoint, tmp_path / "special").path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer(["a", "bc"], padding=True).input_ids == [[0, ord("a")], [ord("b"), ord("c")]]
