"""Prompts become the tokens, and tokens the text, that transformers makes of them; streamed as whole."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fope_export.backends.eager import EagerBackend
from fope_export.generation import generate_text
from fope_export.model.checkpoint import load_checkpoint
from fope_export.serving.sampling import SamplingParams
from fope_export.tokens import Tokenizer
from tests.tokenizers_of_the_field import CLEANED, FAMILIES, LINES

PROMPTS = (*LINES, "x", " leading", "trailing ", "<s> </s> <|im_end|> <think> doesn't  stop", "é" * 3, "a\u2028b\x0c")
NAMES = (*FAMILIES, "padding left on")


def tokenizer_of(name: str) -> tokenizers.Tokenizer:
    if name != "padding left on":
        return FAMILIES[name]()
    tokenizer = FAMILIES["gemma"]()  # what a careless training script saves
    tokenizer.enable_padding(length=40, pad_id=0, pad_token="<unk>")
    tokenizer.enable_truncation(max_length=3)
    return tokenizer


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and one of the tokenizers."""
    made = tmp_path_factory.mktemp("model") / "checkpoint"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(request.param), clean_up_tokenization_spaces=request.param in CLEANED
    )
    tokenizer.save_pretrained(made)
    torch.manual_seed(1)
    vocabulary = len(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = [vocabulary - 1, vocabulary - 7]
    config = LlamaConfig(vocab_size=vocabulary, **sizes, initializer_range=1.0, bos_token_id=None, eos_token_id=ends)
    LlamaForCausalLM(config).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_prompts_become_the_same_tokens(prompt: str, folder: Path, theirs: PreTrainedTokenizerFast) -> None:
    text = Tokenizer(folder)
    assert text.encode(prompt) == theirs(prompt)["input_ids"]
    assert text.encode(prompt, special=False) == theirs(prompt, add_special_tokens=False)["input_ids"]


def test_any_tokens_become_the_same_text_and_streamed_as_whole(folder: Path, theirs: PreTrainedTokenizerFast) -> None:
    text, rng = Tokenizer(folder), np.random.default_rng(0)
    drawn = [rng.integers(0, len(theirs), rng.integers(0, 24)).tolist() for _ in range(150)]
    bytes_ = [i for i in (theirs.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)) if i]
    drawn += [rng.choice(bytes_, 12).tolist() for _ in range(20) if bytes_]
    for ids in [*drawn, *(theirs(prompt)["input_ids"] for prompt in PROMPTS)]:
        assert text.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


def test_greedy_text_is_that_of_transformers(folder: Path, theirs: PreTrainedTokenizerFast) -> None:
    model, text = LlamaForCausalLM.from_pretrained(folder), Tokenizer(folder)
    backend = EagerBackend(load_checkpoint(folder).model)
    prompts = [prompt for prompt in PROMPTS if text.encode(prompt)][:6]
    ours = [""] * len(prompts)
    for row, piece in generate_text(backend, text, prompts, SamplingParams(max_new_tokens=24)):
        ours[row] += piece
    for prompt, written in zip(prompts, ours, strict=True):
        inputs = theirs(prompt, return_tensors="pt", return_token_type_ids=False)
        answer = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
        new = answer[0, inputs["input_ids"].shape[1] :]
        ended = new[-1] in torch.tensor(model.generation_config.eos_token_id)
        wanted = new[:-1] if ended else new
        assert written == theirs.decode(wanted, skip_special_tokens=True)
