"""The configuration files that other runtimes look for beside a model.onnx."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fope_export.config import ExportConfig, ModelConfig, as_written, usual_length
from fope_export.documents import LISTING, as_record, read_object
from fope_export.dtypes import FP32
from fope_export.errors import CheckpointError
from fope_export.manifest import MODEL, OPTIMIZED
from fope_export.tokens import GENERATION


class AddedToken(msgspec.Struct):
    """What a tokenizer.json says about a token that was added to its vocabulary, as far as it is read here."""

    id: int
    content: str
    special: bool = False


CONTEXT_LENGTH = 131_072
"""What runtimes that insist on a maximum are told. A graph with a dynamic cache has none."""


TRANSFORMERS_JS = {"transformers.js_config": {"dtype": FP32.name, "use_external_data_format": True}}
"""For transformers.js: the file is model.onnx, whatever its dtype (where nobody says so, a browser takes one of 8-bit
weights, by another name), and its weights are in another.
"""


def companions(config: ModelConfig, export: ExportConfig, tokenizer_files: Sequence[Path] = ()) -> dict[str, bytes]:
    """File name -> contents. `tokenizer_files` are the checkpoint's, which go into the bundle as they are."""
    files = {path.name: path for path in tokenizer_files}
    described = "tokenizer.json" not in files or "tokenizer_config.json" in files
    made = {
        "config.json": _encoded(
            hugging_face(config, export.capacity or CONTEXT_LENGTH) | (TRANSFORMERS_JS if export.layout else {})
        ),
        GENERATION: _encoded(_tokens(config)),
        **for_genai(config, export),
    }
    return made if described else made | {"tokenizer_config.json": _encoded(tokenizer(config, files["tokenizer.json"]))}


def for_genai(config: ModelConfig, export: ExportConfig, *, optimized: bool = False) -> dict[str, bytes]:
    """What makes ONNX Runtime GenAI load the bundle's model, or the `optimized` one; nothing where tokens have
    positions on several axes, which it does not feed.
    """
    if export.position_axes:
        return {}
    return {"genai_config.json": _encoded(genai(config, export.capacity or CONTEXT_LENGTH, optimized=optimized))}


def _encoded(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def hugging_face(config: ModelConfig, length: int) -> dict[str, Any]:
    """For Optimum, which reads sizes from it and needs a model type it knows; the graph decides what is computed."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.spectrum.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": length,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **_tokens(config),
    }


def genai(config: ModelConfig, length: int, *, optimized: bool) -> dict[str, Any]:
    """For ONNX Runtime GenAI: a plain decoder. Only the optimized file can have past and present in the same memory,
    which GenAI allocates whole, for as many tokens as a search may have.
    """
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": length,
            **_tokens(config),
            "decoder": {
                "filename": OPTIMIZED if optimized else MODEL,
                "hidden_size": config.hidden_size,
                "head_size": config.spectrum.head_dim,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": config.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"provider_options": []},
            },
        },
        "search": {
            "max_length": usual_length(config.training_length) if optimized else length,
            "past_present_share_buffer": optimized,
        },
    }


def tokenizer(config: ModelConfig, path: Path) -> dict[str, Any]:
    """For transformers and GenAI. Where none is named, transformers takes the class that usually goes with the model
    type, and Llama's begins every prompt with a token of its own. Padding and end are named if the file at `path` has
    them as special tokens: naming an ordinary token would make the same characters in a prompt special.
    """
    added = read_object(path, most=LISTING, raises=CheckpointError).get("added_tokens") or []
    tokens = as_record(added, list[AddedToken], f"{path}: added_tokens", raises=CheckpointError)
    special = {token.id: token.content for token in tokens if token.special}
    ends = [token for token in config.ends if token in special]
    names = {"eos_token": ends[0] if ends else None, "pad_token": config.pad_token_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{name: special[token] for name, token in names.items() if token in special},
    }


def _tokens(config: ModelConfig) -> dict[str, Any]:
    ids = {"eos_token_id": as_written(config.ends), "pad_token_id": config.pad_token_id}
    return {name: token for name, token in ids.items() if token is not None}
