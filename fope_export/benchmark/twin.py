"""A RoPE twin: the same shape in Llama's layout, for those that can export nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fope_export.config import ModelConfig
from fope_export.errors import ConfigError
from fope_export.graph.companions import CONTEXT_LENGTH, hugging_face
from fope_export.tokens import byte_tokenizer

THETA = 10_000.0
DEVIATION = 0.02


def write_twin(config: ModelConfig, folder: Path) -> Path:
    """A Llama checkpoint of the same sizes with random weights, into `folder`.

    Raises ConfigError where Llama has no such model.
    """
    if reason := _different(config):
        raise ConfigError(f"a twin in Llama's layout has no {reason}", hint="Leave --peers out.")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_description(config), indent=2))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _draw(shape, generator) for name, shape in _tensors(config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _different(config: ModelConfig) -> str:
    has = {"norm of queries and keys": config.qk_norm, "biases": config.qkv_bias or config.out_bias}
    return " or ".join(name for name, there in (has | {"experts": config.experts is not None}).items() if there)


def _description(config: ModelConfig) -> dict[str, Any]:
    """config.json. GenAI's builder wants a rope_scaling that is not null, and an end of text that is a number."""
    return hugging_face(config, CONTEXT_LENGTH) | {
        "hidden_act": "silu",
        "rope_theta": THETA,
        "rope_scaling": {"rope_type": "default", "rope_theta": THETA},
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.spectrum.head_dim
    heads, kept = config.num_heads * head, config.num_kv_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kept, hidden),
            "self_attn.v_proj": (kept, hidden), "self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            yield f"{layer}{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape) if len(shape) == 1 else DEVIATION * torch.randn(shape, generator=generator)
