"""A decoder with RoPE as llama.cpp reads it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fope_export.errors import require
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.quantizations import INT4, INT8

QUANTS = {INT4.name: "Q4_0", INT8.name: "Q8_0"}
"""GGML's names of how linear layers are rounded."""


def write_gguf(checkpoint: Path, kind: str, out: Path) -> None:
    """A GGUF file of a checkpoint without biases or norms of queries and keys: linear layers as one of QUANTS, or all
    in float32; the embedding stays.
    """
    gguf = require("gguf", "peers")
    model = load_checkpoint(checkpoint).model
    config, head = model.config, model.config.spectrum.head_dim
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config.training_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, checkpoint, config.vocab_size)
    small = gguf.GGMLQuantizationType[QUANTS[kind]] if kind in QUANTS else None
    for name, tensor in _tensors(model):
        if small is not None and tensor.ndim == 2 and name != "token_embd":
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(tensor, small), raw_dtype=small)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, checkpoint: Path, size: int) -> None:
    learnt = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    texts = {number: text for text, number in learnt["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(number, f"<unused{number}>") for number in range(size)])
    merges = learnt["merges"] or [["!", "!"]]  # llama.cpp wants one; it is fed ids
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _tensors(model: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """By llama.cpp's names; its queries and keys have the two halves of a head's channels by turns."""
    config, head = model.config, model.config.spectrum.head_dim
    ours = {name.removesuffix(".weight"): tensor.numpy() for name, tensor in model.state_dict().items()}

    def by_turns(matrix: NDArray[Any]) -> NDArray[Any]:
        return matrix.reshape(-1, 2, head // 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)

    named = {"token_embd": ours["embed"], "output_norm": ours["norm"]}
    if not config.tie_embeddings:
        named["output"] = ours["lm_head"]
    kept = config.num_kv_heads * head
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        q, k, v = np.split(
            ours[f"{layer}attention.att_proj"], [config.num_heads * head, config.num_heads * head + kept]
        )
        up, gate = np.split(ours[f"{layer}feed_forward.ff_proj"], 2)
        named |= {
            f"blk.{i}.attn_norm": ours[f"{layer}attn_norm"], f"blk.{i}.attn_q": by_turns(q),
            f"blk.{i}.attn_k": by_turns(k), f"blk.{i}.attn_v": v,
            f"blk.{i}.attn_output": ours[f"{layer}attention.attn_out"], f"blk.{i}.ffn_norm": ours[f"{layer}ff_norm"],
            f"blk.{i}.ffn_up": up, f"blk.{i}.ffn_gate": gate, f"blk.{i}.ffn_down": ours[f"{layer}feed_forward.ff_out"],
        }  # fmt: skip
    yield from ((name, np.ascontiguousarray(each, np.float32)) for name, each in named.items())
