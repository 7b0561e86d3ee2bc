"""LoRA adapters as PEFT trains, saves and merges them, around modules that are called as a checkpoint's tensors are."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.model.hugging_face import Tensors

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "up_proj", "gate_proj", "down_proj"]


def skeleton(tensors: Tensors) -> nn.Module:
    """Linear layers and embeddings of these names, and whatever else is a parameter; nothing that computes."""
    root = nn.Module()
    for name in sorted(tensors, reverse=True):  # a weight before its bias
        *path, last, kind = name.split(".")
        place = root
        for part in path:
            place = _child(place, part, nn.Module())
        _child(place, last, _layer(last, kind, tensors[name])).register_parameter(
            kind, nn.Parameter(tensors[name].clone())
        )
    return root


def _child(parent: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if name not in dict(parent.named_children()):
        parent.add_module(name, new)
    return parent.get_submodule(name)


def _layer(name: str, kind: str, tensor: torch.Tensor) -> nn.Module:
    if kind != "weight" or tensor.ndim != 2:
        return nn.Module()
    rows, columns = tensor.shape
    with torch.device("meta"):
        return nn.Embedding(rows, columns) if "embed" in name or name == "wte" else nn.Linear(columns, rows, bias=False)


def trained(model: nn.Module, **config: Any) -> PeftModel:
    """A LoRA adapter on `model`, and random numbers in all that it trains."""
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": LINEAR} | config
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**config)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.125)
    return adapted


def saved(adapted: PeftModel, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved too
        adapted.save_pretrained(str(folder), **options)
    return folder


def merged(adapted: PeftModel) -> Tensors:
    """What PEFT's own merge gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(adapted.merge_and_unload().state_dict())
