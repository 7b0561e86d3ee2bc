"""Tensors as other tools store them: 8 bits and their scales, second copies, frequencies, names of wrapped models."""

import base64
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fope_export.errors import CheckpointError, ConfigError, FopeError
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.fp8 import Fp8
from tests.conftest import small_decoder, variant_flags, variant_tensors, write_native
from tests.model.hugging_face import FP8, QKV, Tensors, config_of, multimodal, tensors_of, write

UE8M0 = FP8 | {
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}
"""Intern-S1-Pro's."""
BYTES = torch.tensor([[120, 127, 130], [0, 254, 1]], dtype=torch.uint8)
EXPONENTS = [[-7, 0, 3], [-127, 127, -126]]


def powers() -> Tensor:
    return torch.tensor([[2.0**e for e in row] for row in EXPONENTS], dtype=torch.float64)


@pytest.mark.parametrize(
    "stored", [BYTES, BYTES.view(torch.float8_e8m0fnu), powers(), powers().float()], ids=lambda t: str(t.dtype)
)
def test_ue8m0_scales_are_powers_of_two(stored: Tensor) -> None:
    torch.testing.assert_close(Fp8.of(UE8M0).numbers(stored, "here").double(), powers(), rtol=0, atol=0)


@pytest.mark.parametrize(("fmt", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_a_whole_checkpoint_of_exponents(fmt: str, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    packed, plain = {}, {}
    for key, tensor in tensors_of("intern_dense").items():
        packed[key] = plain[key] = tensor
        if tensor.ndim == 2 and ".layers." in key:
            byte = torch.randint(124, 130, (1, 1), generator=generator, dtype=torch.uint8)
            packed[key], packed[f"{key}_scale_inv"] = tensor.to(dtype), byte
            plain[key] = tensor.to(dtype).float() * 2.0 ** (int(byte) - 127)
    config = config_of("intern_dense")
    for folder, fields, tensors in (
        ("fp8", {"quantization_config": UE8M0 | {"fmt": fmt}}, packed),
        ("plain", {}, plain),
    ):
        write(tmp_path / folder, config | fields, tensors)
    got, wanted = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("fp8", "plain"))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def spoilt_scale(dtype: torch.dtype, value: float = 1.0) -> dict[str, Any]:
    return {"scale": torch.full((1, 1), value).to(dtype)}


BAD_FP8: dict[str, tuple[dict[str, Any], str]] = {
    "exponents that nothing announces": ({"config": FP8} | spoilt_scale(torch.uint8), "scales in torch.uint8"),
    "packed exponents": (spoilt_scale(torch.int32), "scales in torch.int32"),
    "signed bytes": (spoilt_scale(torch.int8), "scales in torch.int8"),
    "scales of 8 bits": (spoilt_scale(torch.float8_e4m3fn), "scales in torch.float8_e4m3fn"),
    "no number": ({"scale": torch.full((1, 1), 255, dtype=torch.uint8)}, "scales that are NaN, infinite or negative"),
    "an infinite scale": (spoilt_scale(torch.float32, torch.inf), "scales that are NaN, infinite or negative"),
    "a negative scale": (spoilt_scale(torch.float32, -1.0), "scales that are NaN, infinite or negative"),
    "a scale for all": ({"scale": torch.ones(())}, r"has scales \(\), expected \(1, 1\)"),
    "a scale for each row": ({"scale": torch.ones(128, 1)}, r"has scales \(128, 1\), expected \(1, 1\)"),
    "no configuration": ({"config": None}, "no quantization_config"),
    "another format of weights": ({"config": UE8M0 | {"fmt": "e5m2"}}, "which quantization_config does not say of it"),
    "another vendor's format": ({"weight": torch.float8_e4m3fnuz}, "which quantization_config does not say of it"),
    "exponents as weights": ({"weight": torch.float8_e8m0fnu}, "which quantization_config does not say of it"),
    "a module that is left alone": (
        {"config": UE8M0 | {"modules_to_not_convert": [QKV.removesuffix(".weight")]}}, "does not say of it"
    ),
    "integers": ({"weight": torch.int8}, "torch.int8, .*expected dense floating point"),
    "another name for scales": ({"name": "_scale"}, "left over: .*_scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FP8)
def test_scales_that_could_mean_something_else_are_refused(name: str, tmp_path: Path) -> None:
    given, message = BAD_FP8[name]
    tensors, config = tensors_of("intern_dense"), given.get("config", UE8M0)
    tensors[QKV] = tensors[QKV].to(given.get("weight", torch.float8_e4m3fn))
    tensors[QKV + given.get("name", "_scale_inv")] = given.get("scale", torch.ones(1, 1))
    fields = {} if config is None else {"quantization_config": config}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(write(tmp_path, config_of("intern_dense") | fields, tensors))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "compressed-tensors"}, "quant_method is 'compressed-tensors', and only 'fp8'"),
        ({"weight_block_size": None}, "weight_block_size is None"), ({"weight_block_size": [64, 128]}, "64, 128"),
        ({"fmt": "e4m3fnuz"}, "fmt is 'e4m3fnuz'"), ({"scale_fmt": "int"}, "scale_fmt is 'int'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"), ({"bits": 8}, "bits is not known"),
        ({"modules_to_not_convert": "lm_head"}, "no list of names"),
    ],
    ids=str,
)  # fmt: skip
def test_a_quantization_config_is_read_strictly(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fp8.of(UE8M0 | fields)


def freq_of(name: str) -> Tensor:
    config = config_of(name)
    base: Tensor = 1.0 / (config["rope_theta"] ** (torch.arange(0, 32, 2).float() / 32))
    return base if "rope" in name else base[base > 2 * torch.pi / config["max_position_embeddings"]]


ONE, EACH = "model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"
HELD = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HELD, ids=str)
@pytest.mark.parametrize("key", [ONE, EACH], ids=["one", "each layer"])
@pytest.mark.parametrize("name", ["intern_dense", "llama_rope"])
def test_stored_frequencies_agree_as_far_as_their_dtype_holds_them(
    name: str, key: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    freq = freq_of(name).to(dtype)
    load_checkpoint(write(tmp_path, config_of(name), tensors_of(name) | {key: freq}))
    load_checkpoint(write(tmp_path, config_of(name), tensors_of(name) | {key: freq[None]}))
    unlike = freq.clone()
    unlike[-1] *= 1 + 4 * torch.finfo(dtype).eps + 1e-5
    with pytest.raises(CheckpointError, match="inv_freq is not what the configuration gives"):
        load_checkpoint(write(tmp_path, config_of(name), tensors_of(name) | {key: unlike}))


@pytest.mark.parametrize(
    "stored", [torch.ones(5), torch.ones(17), torch.ones(0), torch.ones(()), torch.ones(6).long(), torch.ones(6).bool(),
               torch.ones(6).to(torch.float8_e4m3fn)], ids=lambda t: f"{t.dtype} {list(t.shape)}",
)  # fmt: skip
@pytest.mark.parametrize("key", [ONE, EACH], ids=["one", "each layer"])
def test_frequencies_of_another_length_or_kind_are_told(key: str, stored: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"inv_freq is torch.*expected 6 frequencies"):
        load_checkpoint(write(tmp_path, config_of("intern_dense"), tensors_of("intern_dense") | {key: stored}))


def test_our_own_frequencies_are_not_to_be_rounded(tmp_path: Path) -> None:
    write_native(small_decoder(), tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halved, tmp_path / "in/model.safetensors")
    with pytest.raises(CheckpointError, match=r"rotary\.freq was rounded to torch\.bfloat16"):
        load_checkpoint(tmp_path / "in")
    kept = {name: tensor if name.endswith(".freq") else halved[name] for name, tensor in tensors.items()}
    save_file(kept, tmp_path / "in/model.safetensors")
    load_checkpoint(tmp_path / "in")


Store = Callable[[Path, Callable[[Tensors, str, str], None]], Path]
"""Writes a tied checkpoint whose tensors were changed by a function of them and of the names of head and embedding."""


def tied_hugging_face(folder: Path, change: Callable[[Tensors, str, str], None]) -> Path:
    tensors = tensors_of("llama_tied_bias")
    change(tensors, "lm_head.weight", "model.embed_tokens.weight")
    return write(folder, config_of("llama_tied_bias"), tensors)


def tied_native(folder: Path, change: Callable[[Tensors, str, str], None]) -> Path:
    write_native(small_decoder(tie_embeddings=True), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "lm_head.weight", "embed.weight")
    save_file(tensors, folder / "model.safetensors")
    return folder


def tied_olmo(folder: Path, change: Callable[[Tensors, str, str], None]) -> Path:
    folder.mkdir()
    tensors = variant_tensors("plain")
    del tensors["transformer.ff_out.weight"]
    change(tensors, "transformer.ff_out.weight", "transformer.wte.weight")
    (folder / "config.yaml").write_text(json.dumps({"model": variant_flags("plain") | {"weight_tying": True}}))
    torch.save(tensors, folder / "model.pt")
    return folder


TIED = [tied_hugging_face, tied_native, tied_olmo]


@pytest.mark.parametrize("store", TIED, ids=lambda store: store.__name__)
def test_a_tied_head_may_be_stored_too_or_alone(store: Store, tmp_path: Path) -> None:
    def equal(tensors: Tensors, head: str, embed: str) -> None:
        tensors[head] = tensors[embed].clone()

    def unequal(tensors: Tensors, head: str, embed: str) -> None:
        equal(tensors, head, embed)
        tensors[head][0, 0] += 1

    def alone(tensors: Tensors, head: str, embed: str) -> None:
        tensors[head] = tensors.pop(embed)

    model, other = (load_checkpoint(store(tmp_path / change.__name__, change)).model for change in (equal, alone))
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, other.embed.weight)
    with pytest.raises(CheckpointError, match=r"(lm_head|ff_out)\.weight and .*(embed|wte).* differ"):
        load_checkpoint(store(tmp_path / "unequal", unequal))


def test_copies_are_compared_by_their_numbers(tmp_path: Path) -> None:
    tensors = tensors_of("llama_tied_bias")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    load_checkpoint(write(tmp_path, config_of("llama_tied_bias"), tensors))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        load_checkpoint(write(tmp_path, config_of("llama_tied_bias"), tensors))


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor for name, tensor in tensors_of("qwen3_moe").items()}


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "in a trainer's module": lambda name: f"model.{name}",
    "deeper": lambda name: f"policy.net.{name}",
    "layers compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "sharded": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_models_names_are_unwrapped(name: str, tmp_path: Path) -> None:
    wanted = load_checkpoint(write(tmp_path / "plain", config_of("qwen3_moe"), tensors_of("qwen3_moe"))).model
    got = load_checkpoint(write(tmp_path / "wrapped", config_of("qwen3_moe"), renamed(WRAPPED[name]))).model
    assert all(torch.equal(got.state_dict()[key], tensor) for key, tensor in wanted.state_dict().items())


def test_other_layouts_are_unwrapped_too(tmp_path: Path, write_variant: Callable[[str], Path]) -> None:
    folder, wrapped = write_variant("plain"), {f"module.{name}": x for name, x in variant_tensors("plain").items()}
    wanted = {name: tensor.clone() for name, tensor in load_checkpoint(folder).model.state_dict().items()}
    encoded = {base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode(): x for name, x in wrapped.items()}
    for file, save, tensors in (("model.pt", torch.save, wrapped), ("model.safetensors", save_file, encoded)):
        save(tensors, folder / file)
        assert all(torch.equal(wanted[key], x) for key, x in load_checkpoint(folder).model.state_dict().items())
    config, whole = multimodal("intern_dense")
    load_checkpoint(write(tmp_path / "whole", config, {f"module.{name}": tensor for name, tensor in whole.items()}))


AMBIGUOUS: dict[str, tuple[Callable[[], Tensors], str]] = {
    "the same twice": (
        lambda: tensors_of("qwen3_moe") | renamed(lambda name: f"_orig_mod.{name}"),
        r"_orig_mod\.\S+ and \S+ are both|\S+ and _orig_mod\.\S+ are both",
    ),
    "two models": (
        lambda: renamed(lambda name: f"teacher.{name}") | renamed(lambda name: f"student.{name}"),
        "tensors missing: .*begin with student. and with teacher.",
    ),
    "some of one": (
        lambda: renamed(lambda name: f"module.{name}" if "layers.0" in name else name),
        "tensors missing: .*begin with module.",
    ),
    "a prefix and more": (
        lambda: renamed(lambda name: f"module.{name}") | {"step": torch.zeros(1)}, "missing: .*begin with module."
    ),
    "two names of one embedding": (
        lambda: {
            "model.layers.0.self_attn.pos_emb.sin_coef": torch.ones(1),
            "model.layers.0.self_attn.rotary_emb.sin_coef": torch.ones(1),
        },
        "pos_emb.sin_coef and .*rotary_emb.sin_coef are both|rotary_emb.sin_coef and .*pos_emb.sin_coef are both",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_names_that_could_be_two_things_are_refused(name: str, tmp_path: Path) -> None:
    tensors, message = AMBIGUOUS[name]
    with pytest.raises(FopeError) as caught:
        load_checkpoint(write(tmp_path, config_of("qwen3_moe"), tensors()))
    assert re.search(message, f"{caught.value} {caught.value.hint}"), caught.value
