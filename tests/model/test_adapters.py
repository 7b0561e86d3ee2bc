"""LoRA adapters give what PEFT's own merge gives, to the last bit; each of their fields counts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from tests.conftest import small_decoder, variant_tensors, write_native
from tests.model.hugging_face import FP8, QKV, Tensors, config_of, multimodal, tensors_of, write
from tests.model.peft_adapters import ATTENTION, LINEAR, merged, saved, skeleton, trained
from tests.model.theirs import IDS, last_logits
from tests.support import same_function, truth_of

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("intern_dense", {}),
    "rank-stabilized": ("intern_dense", {"use_rslora": True}),
    "patterns": (
        "intern_dense",
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 8, "^model.layers.0.*down_proj": 2, "k_proj": 3},
            "alpha_pattern": {".*o_proj": 5, r"model\.layers\.(0|1)\.mlp\.up_proj": 11, "proj": 99},
        },
    ),
    "whole modules": (
        "intern_dense", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    ),
    "whole coefficients": ("intern_dense", {"target_modules": ATTENTION, "modules_to_save": ["rotary_emb"]}),
    "DoRA": ("intern_dense", {"use_dora": True, "use_rslora": True}),
    "an embedding": ("intern_dense", {"target_modules": [*LINEAR, "embed_tokens"]}),
    "an embedding's DoRA": ("intern_dense", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "the head": ("intern_dense", {"target_modules": [*LINEAR, "lm_head"]}),
    "all biases": ("intern_bias", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "biases of what is adapted": ("intern_bias", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "one layer": ("intern_dense", {"layers_to_transform": 1}),
    "layers by their list": ("intern_dense", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "an exception": ("intern_dense", {"exclude_modules": ["layers.0.mlp.up_proj"]}),
    "an expression": ("intern_dense", {"target_modules": r"(?:model\.)+.*\.(?:q|v)_proj"}),
    "as for Conv1D": ("intern_dense", {"fan_in_fan_out": True, "use_dora": True}),
    "experts": ("qwen3_moe", {"target_modules": [*LINEAR, "gate"]}),
    "attention beside experts": ("qwen3_moe", {"target_modules": ATTENTION}),
}  # fmt: skip


def stored(folder: Path, name: str, tensors: Tensors) -> Path:
    return write(folder, config_of(name), {key: tensor.contiguous() for key, tensor in tensors.items()})


def state_of(folder: Path, adapter: Path | None = None) -> Tensors:
    return dict(load_checkpoint(folder, adapter=adapter).model.state_dict())


def equal(one: Tensors, other: Tensors) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def on(tmp_path: Path, name: str, **config: Any) -> tuple[Path, Path, Path]:
    """A base, an adapter of it, and what PEFT merges of both."""
    tensors = tensors_of(name)
    adapted = trained(skeleton(tensors), **config)
    adapter = saved(adapted, tmp_path / "adapter")
    return stored(tmp_path / "base", name, tensors), adapter, stored(tmp_path / "merged", name, merged(adapted))


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    base, adapter, wanted = on(tmp_path, name, **config)
    assert equal(state_of(base, adapter), state_of(wanted))
    assert not equal(state_of(base), state_of(wanted))


COUNTS: dict[str, tuple[str, Any]] = {
    "lora_alpha": ("plain", 7),
    "use_rslora": ("rank-stabilized", False),
    "alpha_pattern": ("patterns", {"proj": 99}),
}


@pytest.mark.parametrize("field", COUNTS)
def test_each_field_counts(field: str, tmp_path: Path) -> None:
    case, value = COUNTS[field]
    name, config = CASES[case]
    base, adapter, wanted = on(tmp_path, name, **config)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert not equal(state_of(base, adapter), state_of(wanted))


def test_halves_and_pickles_are_merged_in_float32(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of("qwen3_rope").items()}
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    adapter = saved(trained(skeleton(wide), use_dora=True), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    torch.save({name: tensor.half() for name, tensor in load_file(file).items()}, adapter / "adapter_model.bin")
    file.unlink()
    peft = merged(PeftModel.from_pretrained(skeleton(wide), str(adapter)))
    got = state_of(stored(tmp_path / "base", "qwen3_rope", tensors), adapter)
    assert equal(got, state_of(stored(tmp_path / "merged", "qwen3_rope", peft)))


def test_weights_of_8_bits_are_multiplied_out_first(tmp_path: Path) -> None:
    tensors = tensors_of("intern_dense")
    packed = tensors | {QKV: tensors[QKV].to(torch.float8_e4m3fn), f"{QKV}_scale_inv": torch.full((1, 1), 0.5)}
    plain = tensors | {QKV: packed[QKV].float() * 0.5}
    adapted = trained(skeleton(plain))
    adapter = saved(adapted, tmp_path / "adapter")
    base = write(tmp_path / "base", config_of("intern_dense") | {"quantization_config": FP8}, packed)
    assert equal(state_of(base, adapter), state_of(stored(tmp_path / "merged", "intern_dense", merged(adapted))))


def test_other_layouts_have_names_of_their_own(tmp_path: Path, write_variant: Callable[[str], Path]) -> None:
    base = write_variant("plain")
    adapted = trained(skeleton(variant_tensors("plain")), target_modules=["att_proj", "ff_out", "wte"])
    wanted = shutil.copytree(base, tmp_path / "wanted")
    (wanted / "model.pt").unlink()
    adapter = saved(adapted, tmp_path / "adapter")
    torch.save(merged(adapted), wanted / "model.pt")
    assert equal(state_of(base, adapter), state_of(wanted))


def test_our_own_layout_too(tmp_path: Path) -> None:
    base, wanted = tmp_path / "base", tmp_path / "wanted"
    for folder in (base, wanted):
        write_native(small_decoder(), folder)
    adapted = trained(skeleton(load_file(base / "model.safetensors")), target_modules=["att_proj", "lm_head"])
    adapter = saved(adapted, tmp_path / "adapter")
    save_file({name: tensor.contiguous() for name, tensor in merged(adapted).items()}, wanted / "model.safetensors")
    assert equal(state_of(base, adapter), state_of(wanted))


WRAPPED: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "a compiled base": (lambda name: f"_orig_mod.{name}", lambda name: name),
    "a compiled adapter": (lambda name: name, lambda name: name.replace("model.model.", "model._orig_mod.model.")),
    "a parallel adapter": (lambda name: f"module.{name}", lambda name: f"module.{name}"),
    "no prefix": (lambda name: name, lambda name: name.removeprefix("base_model.model.")),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_go_as_they_do_in_checkpoints(kind: str, tmp_path: Path) -> None:
    of_base, of_adapter = WRAPPED[kind]
    base, adapter, wanted = on(tmp_path, "intern_dense")
    for file, rename in ((base / "model.safetensors", of_base), (adapter / "adapter_model.safetensors", of_adapter)):
        save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    assert equal(state_of(base, adapter), state_of(wanted))


def test_the_text_model_of_a_larger_one(tmp_path: Path) -> None:
    """What is trained of the other models there is theirs."""
    config, tensors = multimodal("intern_dense")
    adapted = trained(skeleton(tensors), target_modules=[*LINEAR, "qkv"])
    base = write(tmp_path / "base", config, tensors)
    got = state_of(base, saved(adapted, tmp_path / "adapter"))
    assert equal(
        got, state_of(write(tmp_path / "merged", config, {k: t.contiguous() for k, t in merged(adapted).items()}))
    )


TIED: dict[str, tuple[dict[str, Any], bool | None]] = {
    "neither": ({}, True),
    "the embedding adapted": ({"target_modules": [*ATTENTION, "embed_tokens"]}, False),
    "the head adapted": ({"target_modules": [*ATTENTION, "lm_head"]}, False),
    "the embedding whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "the head whole": ({"modules_to_save": ["lm_head"]}, False),
    "both whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both whole, and one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both adapted, and one": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        None,
    ),  # as far as rounding goes
}


def llama() -> transformers.LlamaForCausalLM:
    fields = {name: value for name, value in config_of("llama_tied_bias").items() if name != "dtype"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.load_state_dict(tensors_of("llama_tied_bias"), strict=False)
    return model


def same_logits(model: Decoder, adapted: PeftModel) -> None:
    with torch.inference_mode():
        theirs = adapted(input_ids=torch.from_numpy(IDS)).logits[:, -4:].numpy()
    same_function(last_logits(model, IDS, 4), theirs, truth_of(model, IDS)[:, -4:])


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_computes_what_its_adapter_does_in_peft(case: str, tmp_path: Path) -> None:
    """Where head and embedding are no longer one, PEFT's merge of an adapted one would change both."""
    config, tied = TIED[case]
    adapted = trained(llama(), **{"target_modules": ATTENTION} | config)
    base = write(tmp_path / "base", config_of("llama_tied_bias"), tensors_of("llama_tied_bias"))
    loaded = load_checkpoint(base, adapter=saved(adapted, tmp_path / "adapter"))
    assert loaded.config.tie_embeddings is (loaded.model.lm_head.weight is loaded.model.embed.weight)
    assert tied in (None, loaded.config.tie_embeddings)
    same_logits(loaded.model, adapted)


def test_tokens_added_to_a_tied_model_leave_it_tied(tmp_path: Path) -> None:
    model = llama()
    model.resize_token_embeddings(100, mean_resizing=False)
    adapted = trained(model, target_modules=ATTENTION)
    base = write(tmp_path / "base", config_of("llama_tied_bias"), tensors_of("llama_tied_bias"))
    adapter = saved(adapted, tmp_path / "adapter", save_embedding_layers=True)
    loaded = load_checkpoint(base, adapter=adapter)
    assert loaded.config.tie_embeddings and loaded.config.vocab_size == 100
    same_logits(loaded.model, adapted)
