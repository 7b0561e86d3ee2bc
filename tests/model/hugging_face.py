"""Checkpoints in Hugging Face's layout, with the weights that expected logits were computed with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conftest import DATA, draw

VARIANTS = json.loads((DATA / "hf_variants.json").read_text())
Tensors = dict[str, torch.Tensor]
QKV = "model.layers.0.self_attn.q_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def tensors_of(name: str) -> Tensors:
    case = VARIANTS["cases"][name]
    return draw(case["seed"], case["shapes"])


def config_of(name: str) -> dict[str, Any]:
    case = VARIANTS["cases"][name]
    return {"model_type": case["model_type"], "dtype": "float32", **VARIANTS["base"], **case["fields"]}


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def multimodal(name: str) -> tuple[dict[str, Any], Tensors]:
    """The variant as the language model of a larger one."""
    config = {"model_type": "interns1_pro", "tie_word_embeddings": False, "text_config": config_of(name)}
    inner = {key.replace("model.", "model.language_model.", 1): tensor for key, tensor in tensors_of(name).items()}
    return config, inner | {"model.visual.blocks.0.attn.qkv.weight": torch.zeros(3, 3)}
