"""Adapters that are incomplete, of another base, or of a kind that is not merged: each is told, with a next step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fope_export.errors import CheckpointError, ConfigError, FopeError
from fope_export.model.checkpoint import load_checkpoint
from tests.model.hugging_face import Tensors, config_of, tensors_of, write
from tests.model.peft_adapters import LINEAR, saved, skeleton, trained

NAME = "base_model.model.model.layers.0.self_attn."
A, B = f"{NAME}q_proj.lora_A.weight", f"{NAME}q_proj.lora_B.weight"
LENGTHS = f"{NAME}q_proj.lora_magnitude_vector"
NORM, HEAD = "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", config_of("intern_bias"), tensors_of("intern_bias"))


def adapter_of(tmp_path: Path, **config: Any) -> Path:
    return saved(trained(skeleton(tensors_of("intern_bias")), **config), tmp_path / "adapter")


def told(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def changed(adapter: Path, change: Callable[[Tensors], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def refused(base: Path, adapter: Path, message: str) -> FopeError:
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load_checkpoint(base, adapter=adapter)
    assert str(adapter) in str(caught.value) and caught.value.hint
    return caught.value


def at(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def without(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def both(rank: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({A: torch.ones(rank, 64), B: torch.ones(128, rank)})


def renamed(*names: tuple[str, str]) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for old, new in names:
            for name in [name for name in tensors if old in name]:
                tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def swapped(tensors: Tensors) -> None:
    tensors[A], tensors[B] = tensors[B], tensors[A]


def poisoned(tensors: Tensors) -> None:
    tensors[B][3, 1] = torch.nan


Kinds = dict[str, tuple[dict[str, Any], Callable[[Tensors], object], str]]
"""What is trained, what then happens to the file, and what is told."""

DAMAGED: Kinds = {
    "a matrix missing": ({}, without("layers.0.self_attn.q_proj.lora_B"), r"q_proj\.lora_B\.weight is not there"),
    "a layer missing": ({}, without("layers.1.mlp.up_proj"), r"model\.layers\.1\.mlp\.up_proj\.weight is not there"),
    "matrices swapped": ({}, swapped, r"matrices \(128, 4\) and \(4, 64\), expected rank 4"),
    "another rank": ({}, at(A, torch.ones(5, 64)), r"matrices \(5, 64\) and \(128, 4\), expected rank 4"),
    "another rank throughout": ({}, both(5), r"matrices \(5, 64\) and \(128, 5\), expected rank 4"),
    "no matrix": ({}, at(A, torch.ones(4)), r"matrices \(4,\)"),
    "another layer's inputs": ({}, at(A, torch.ones(4, 63)), r"is for shape \(128, 63\), the base has \(128, 64\)"),
    "no number": ({}, poisoned, r"q_proj\.lora_B holds NaN or infinity"),
    "an infinite number": ({}, at(A, torch.full((4, 64), torch.inf)), r"q_proj\.lora_A holds NaN or infinity"),
    "integers": ({}, at(A, torch.ones(4, 64).int()), "torch.int32, expected floating point"),
    "8 bits": ({}, at(A, torch.ones(4, 64).to(torch.float8_e4m3fn)), "float8_e4m3fn, expected floating point"),
    "one left over": ({}, at(f"{NAME}z_proj.bias", torch.ones(4)), r"changes model\.layers\.0\.self_attn\.z_proj, "),
    "one that is no target": ({"target_modules": ["v_proj"]}, both(4), r"layers\.0\.self_attn\.q_proj is there, "),
    "one of another layer": ({"layers_to_transform": [1]}, both(4), r"layers\.0\.self_attn\.q_proj is there, "),
    "an adapter's name": ({}, renamed(("lora_A.", "lora_A.default.")), "not of a LoRA adapter as PEFT saves it"),
    "no lengths": ({"use_dora": True}, without("0.self_attn.q_proj.lora_mag"), "lora_magnitude_vector is not there"),
    "lengths left over": ({}, at(LENGTHS, torch.ones(128)), "lora_magnitude_vector is there"),
    "too few lengths": ({"use_dora": True}, at(LENGTHS, torch.ones(127)), r"has \(127,\) lengths, expected 128"),
    "a bias missing": ({"bias": "all"}, without("layers.1.self_attn.o_proj.b"), "o_proj.bias is not there"),
    "an adapted bias": ({"bias": "lora_only"}, without("layers.1.self_attn.o_proj.b"), "o_proj.bias is not there"),
    "another bias": ({"bias": "all"}, at(f"{NAME}q_proj.base_layer.bias", torch.ones(5)), r"is for shape \(5,\)"),
    "a bias twice": ({"bias": "all"}, at(f"{NAME}q_proj.bias", torch.ones(128)), "two tensors are .*q_proj.bias"),
    "a matrix twice": ({}, at(A.removeprefix("base_model.model."), torch.ones(4, 64)), "two tensors are .*q_proj.lo"),
    "no whole module": ({"modules_to_save": ["lm_head"]}, without("lm_head"), "lm_head.weight is not there"),
    "no number of a norm": (
        {"modules_to_save": ["model.norm"]},
        at(NORM, torch.full((64,), torch.nan)),
        "norm holds NaN",
    ),
    "another norm": ({"modules_to_save": ["model.norm"]}, at(NORM, torch.ones(9)), r"for shape \(9,\), the base has"),
    "a linear layer's for an embedding": (
        {"target_modules": [*LINEAR, "embed_tokens"]},
        renamed(("lora_embedding_A", "lora_A.weight"), ("lora_embedding_B", "lora_B.weight")),
        "embed_tokens: lora_embedding_A and _B are of an embedding alone",
    ),
}
LATE: Kinds = {
    "more than float32 holds": ({}, lambda t: t.update({A: t[A] * 0 + 1, B: t[B] * 0 + 3e38}), "holds NaN or infinity"),
    "a longer head": ({"modules_to_save": ["lm_head"]}, at(HEAD, torch.ones(99, 64)), r"lm_head.weight has shape \(99"),
}
"""What the loader of the base sees, in what comes out."""


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_adapter_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    config, change, message = DAMAGED[kind]
    adapter = adapter_of(tmp_path, **config)
    changed(adapter, change)
    refused(base, adapter, message)


@pytest.mark.parametrize("kind", LATE)
def test_what_comes_out_is_checked_as_any_checkpoint(kind: str, base: Path, tmp_path: Path) -> None:
    config, change, message = LATE[kind]
    adapter = adapter_of(tmp_path, **config)
    changed(adapter, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(base, adapter=adapter)


@pytest.mark.parametrize(
    "kind",
    ["ADALORA", "IA3", "LOHA", "LOKR", "VERA", "PREFIX_TUNING", "PROMPT_TUNING", "TRAINABLE_TOKENS", "OFT", None],
)
def test_other_kinds_are_refused_by_name(kind: str | None, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    told(adapter, peft_type=kind)
    assert "merge_and_unload" in refused(base, adapter, f"peft_type is {kind}").hint


OTHERS: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 2}, "init_lora_weights": "pissa_niter_4",
    "kasa_config": {"beta": 1}, "layer_replication": [[0, 2], [1, 2]], "lora_bias": True, "megatron_config": {"a": 1},
    "target_parameters": ["mlp.experts.gate_up_proj"], "trainable_token_indices": [3], "use_bdlora": {"nblocks": 2},
    "use_qalora": True, "velora_config": {"num_groups": 2}, "a_field_of_tomorrow": 0,
}  # fmt: skip


def test_all_fields_that_mean_more_are_named_at_once(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    told(adapter, **OTHERS)
    error = refused(base, adapter, "could mean another model")
    assert all(name in str(error) for name in OTHERS) and "merge_and_unload" in error.hint
    assert "lora_alpha" not in str(error) and "task_type" not in str(error)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_a_changed_base_is_refused(init: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    told(adapter, init_lora_weights=init)
    refused(base, adapter, f"init_lora_weights is {init}")


def test_what_changes_nothing_counts_as_absent(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    neutral = {"layer_replication": [], "use_qalora": False, "lora_bias": False, "init_lora_weights": "eva"}
    told(adapter, **dict.fromkeys(OTHERS) | neutral, lora_dropout=0.3, rank_pattern=None)
    load_checkpoint(base, adapter=adapter)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 0}, "r: Expected `int` >= 1"),
    "text": ({"lora_alpha": "16"}, "lora_alpha: Expected `float`, got `str`"),
    "no number": ({"alpha_pattern": {"q_proj": [1]}}, "alpha_pattern"),
    "bias": ({"bias": "some"}, "bias: Invalid enum value"),
    "no expression": ({"rank_pattern": {"(q_proj": 4}}, r"\(q_proj is no pattern"),
    "an endless expression": ({"rank_pattern": {"(a+)+b": 4}}, "could take for ever"),
    "another one": ({"layers_to_transform": [0], "layers_pattern": ["(x|x)*y"]}, "could take for ever"),
    "half an expression": ({"layers_to_transform": [0], "layers_pattern": "a)(b"}, r"a\)\(b is no pattern"),
    "too many repetitions": ({"alpha_pattern": {".*a.*b.*c.*d": 4}}, "could take for ever"),
    "too many patterns": ({"rank_pattern": {f"p{i}": 4 for i in range(10_001)}}, "10001 patterns"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_of_other_types_are_refused(kind: str, base: Path, tmp_path: Path) -> None:
    fields, message = FIELDS[kind]
    adapter = adapter_of(tmp_path)
    told(adapter, **fields)
    refused(base, adapter, message)


def test_an_adapter_of_another_architecture_says_so(base: Path, tmp_path: Path) -> None:
    other = {name.replace("self_attn", "attention"): tensor for name, tensor in tensors_of("intern_dense").items()}
    adapter = saved(trained(skeleton(other)), tmp_path / "adapter")
    assert "another base" in refused(base, adapter, r"changes model\.layers\.0\.attention\.\w_proj, .*, …, which").hint
    smaller = {
        name: tensor[..., :32] if tensor.ndim == 2 else tensor for name, tensor in tensors_of("intern_dense").items()
    }
    refused(base, saved(trained(skeleton(smaller)), tmp_path / "adapter"), "is for shape .*, the base has")


def test_what_is_missing_of_a_folder_is_named(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    refused(base, adapter, "no adapter_model.safetensors or adapter_model.bin")
    (adapter / "adapter_config.json").unlink()
    refused(base, adapter, "no adapter_config.json")
    refused(base, tmp_path / "nowhere", "no adapter_config.json")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside its base's config.json"])
def test_an_adapter_is_no_checkpoint(beside: bool, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    if beside:
        (adapter / "config.json").write_text(json.dumps(config_of("intern_bias")))
    with pytest.raises(CheckpointError, match="an adapter, and no checkpoint") as caught:
        load_checkpoint(adapter)
    assert "--adapter" in caught.value.hint


def test_a_base_that_is_damaged_is_told_as_ever(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    file = base / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "q_proj.weight" not in name}, file)
    with pytest.raises(CheckpointError, match=r"base/model.safetensors: 2 tensors missing: .*q_proj\.weight"):
        load_checkpoint(base, adapter=adapter)


def test_so_is_a_tied_one_without_any_embedding(tmp_path: Path) -> None:
    tensors = tensors_of("llama_tied_bias")
    adapter = saved(trained(skeleton(tensors), target_modules=["embed_tokens"]), tmp_path / "adapter")
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensors missing: model\.embed_tokens\.weight"):
        load_checkpoint(write(tmp_path / "base", config_of("llama_tied_bias"), tensors), adapter=adapter)
