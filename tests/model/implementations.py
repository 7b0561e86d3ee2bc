"""Every public implementation of FoPE: a checkpoint as it writes or reads one, and the logits that its code gives.

Logits come from the code itself where it can be had (tests/data/README.md). Else the position embedding is written here
from its source, which each row names, and the rest is transformers' model. Nothing here is the package's.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_vl_moe import configuration_qwen3_vl_moe, modeling_qwen3_vl_moe

from tests.conftest import DATA
from tests.model.hugging_face import Tensors, write

HEAD_DIM, KV_HEADS, LENGTH, THETA = 16, 2, 128, 1e4
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5, "head_dim": HEAD_DIM,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
IDS = torch.randint(96, (2, 200), generator=torch.Generator().manual_seed(3))
Tables = tuple[Tensor, Tensor]
"""Sine and cosine [G, S, E], in float32."""


def base(theta: float = THETA) -> Tensor:
    """float32 [E / 2]."""
    return 1.0 / (theta ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))


def above_the_floor(freq: Tensor) -> Tensor:
    return freq[freq > 2.0 * torch.pi / LENGTH]


def coefficients(freq: Tensor, pairs: int | None = None, groups: int = KV_HEADS) -> list[Tensor]:
    """Sine's and cosine's [G, D, F]."""
    generator = torch.Generator().manual_seed(7)
    eye = torch.eye(len(freq), pairs or len(freq))
    return [eye + 0.3 * torch.rand(groups, *eye.shape, generator=generator) for _ in range(2)]


def tables(
    freq: Tensor, sin_coef: Tensor, cos_coef: Tensor, *, scale: float = 1.0, sin_pad: float = 1.0,
    angles: Tensor | None = None,
) -> Tables:  # fmt: skip
    """What all of them do once frequencies are known: mix, pad, and multiply by the scale of attention. The angles
    [S, D] are those of tokens one after the other, where no others are given.
    """
    angles = torch.arange(IDS.shape[1]).float()[:, None] * freq if angles is None else angles
    made = []
    for wave, coef, pad in ((angles.sin(), sin_coef, sin_pad), (angles.cos(), cos_coef, 1.0)):
        mixed = torch.einsum("td,gdf->gtf", wave, coef)
        mixed = functional.pad(mixed, (0, HEAD_DIM // 2 - mixed.shape[-1]), value=pad)
        made.append(torch.cat((mixed, mixed), -1) * scale)
    return made[0], made[1]


def turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x [B, H, S, E], whose heads share the tables [G, S, E] evenly."""
    sin, cos = (table.repeat_interleave(x.shape[1] // len(table), 0).to(x.dtype) for table in (sin, cos))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


@contextmanager
def positions_by(kind: str, sin: Tensor, cos: Tensor) -> Iterator[None]:
    """transformers' decoder of a type turns queries and keys by these tables."""
    module: Any = import_module(f"transformers.models.{kind}.modeling_{kind}")
    kept, repeat = module.apply_rotary_pos_emb, module.repeat_kv

    def rotate(q: Tensor, k: Tensor, *others: Any, **more: Any) -> Tables:
        k = repeat(k, max(len(sin) // k.shape[1], 1))
        return turned(q, sin, cos), turned(k, sin, cos)

    module.apply_rotary_pos_emb = rotate
    module.repeat_kv = lambda x, times: x if x.shape[1] == SIZES["num_attention_heads"] else repeat(x, times)
    try:
        yield
    finally:
        module.apply_rotary_pos_emb, module.repeat_kv = kept, repeat


def random_model(kind: str, **fields: Any) -> torch.nn.Module:
    """transformers' decoder of a type in float64; its inner products are large enough to attend."""
    config = AutoConfig.for_model(kind, **(SIZES | fields))
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(
                1.0 if "norm" in name else 0.0, 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            )
    return model


@dataclass(frozen=True)
class Implementation:
    """`source` is the code that `freq` and `scale` were written from; `rope` is what it leaves in a config.json, `kind`
    and `model_type` what its model is called by transformers and there. `planted` changes the checkpoint, and has to be
    refused with the message.
    """

    source: str
    kind: str
    rope: dict[str, Any]
    planted: tuple[Callable[[dict[str, Any], Tensors], object], str]
    freq: Callable[[], Tensor] = lambda: above_the_floor(base())
    scale: float = 1.0
    fields: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""
    per_layer: bool = False
    pairs: int | None = None
    groups: int = KV_HEADS
    stored: Callable[[Tensor], Tensor] = lambda coef: coef
    read: Callable[[Tensor], Tensor] = lambda coef: coef

    def write(self, folder: Path, spoil: Callable[[dict[str, Any], Tensors], object] | None = None) -> Path:
        """A checkpoint."""
        model = random_model(self.kind, **self.fields)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        places = [f"model.layers.{i}.self_attn" for i in range(2)] if self.per_layer else ["model"]
        for name, coef in zip(("sin_coef", "cos_coef"), self.coefficients(), strict=True):
            tensors |= {f"{place}.rotary_emb.{name}": self.stored(coef).clone() for place in places}
        config = deepcopy({"model_type": self.model_type or self.kind} | SIZES | self.fields | self.rope)
        if spoil:
            spoil(config, tensors)
        return write(folder, config, tensors)

    def coefficients(self) -> list[Tensor]:
        return coefficients(self.freq(), self.pairs, self.groups)

    def logits(self, **changed: Any) -> Tensor:
        """float64 [B, S, V], of a position embedding that may be `changed`."""
        model = random_model(self.kind, **self.fields).double()
        sin_coef, cos_coef = (self.read(coef) for coef in self.coefficients())
        sin, cos = tables(self.freq(), sin_coef, cos_coef, **{"scale": self.scale} | changed)
        with positions_by(self.kind, sin, cos), torch.inference_mode():
            logits: Tensor = model(IDS).logits
        return logits


def scaled(kind: str, **fields: Any) -> tuple[Tensor, float]:
    """transformers' own frequencies and scale of attention for a rope_type."""
    rope = {"rope_type": kind} | fields
    config = AutoConfig.for_model("llama", **SIZES, rope_theta=THETA, rope_scaling=rope)
    freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return freq, scale


def set_rope(place: str, **fields: Any) -> Callable[[dict[str, Any], Tensors], object]:
    return lambda config, tensors: config[place].update(fields)


NULLS = dict.fromkeys(
    "original_max_position_embeddings factor beta_fast beta_slow short_factor long_factor low_freq_factor "
    "high_freq_factor mscale mscale_all_dim mrope_section num_inv_freq".split()
)
DUMP = {
    "rope_theta": THETA, "rope_type": "default", "truncate": False, "partial_rotary_factor": 1.0,
    "fope_init_factor": 0.1, "fope_sep_head": True, **NULLS,
}  # fmt: skip
"""rope_parameters as xtuner's RopeParametersConfig writes them: every field."""
INTERN = {"rope_type": "default", "fope_init_factor": 0.5, "fope_sep_head": True, "num_inv_freq": None}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 1.0}
LLAMA3 = {"factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PAPER = {
    "fourier": True, "fourier_norm": False, "fourier_separate_basis": True, "fourier_separate_head": True,
    "fourier_ignore_zero": True, "rope_clamp_floor_freq": True, "rope_clamp_floor_to_zero": True,
    "rope_full_precision": True, "rope_theta": THETA,
}  # fmt: skip
XTUNER = "github.com/InternLM/xtuner b934f46 xtuner/v1/module/rope/rope.py FourierEmbedding"
LMDEPLOY = "github.com/InternLM/lmdeploy 1263d5c lmdeploy/pytorch/nn/rotary_embedding.py"
VLLM = "github.com/vllm-project/vllm 07b12f1 vllm/model_executor/layers/rotary_embedding/fope.py"
SGLANG = "github.com/sgl-project/sglang 0b1fd02 python/sglang/srt/layers/rotary_embedding/rope_variant.py"
ROPE_PP = "github.com/OpenMOSS/rope_pp 91ba335 rope_pp/modeling_llama_fope.py FourierEmbedding"
D_DIFFERS = "D is .* in the weights but .* from the configuration"


def ports_floor() -> Tensor:
    freq = base()
    return freq[freq >= 2 * math.pi / LENGTH]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xtuner": Implementation(
        XTUNER, "qwen3_moe", {"rope_parameters": DUMP}, (set_rope("rope_parameters", num_inv_freq=2), D_DIFFERS),
        fields=EXPERTS, model_type="qwen3_moe_fope",
    ),
    "xtuner, yarn": Implementation(
        XTUNER, "qwen3", {"rope_parameters": DUMP | {"rope_type": "yarn"} | YARN},
        (set_rope("rope_parameters", rope_type="dynamic"), "rope_type is 'dynamic'"),
        freq=lambda: above_the_floor(scaled("yarn", truncate=False, **YARN)[0]),
        scale=scaled("yarn", truncate=False, **YARN)[1],
    ),
    "xtuner, llama3": Implementation(
        XTUNER, "llama", {"rope_parameters": DUMP | {"rope_type": "llama3"} | LLAMA3},
        (set_rope("rope_parameters", low_freq_factor=None), "'llama3' needs low_freq_factor"),
        freq=lambda: above_the_floor(scaled("llama3", **LLAMA3)[0]),
    ),
    "LMDeploy": Implementation(
        LMDEPLOY, "qwen3",
        {"rope_theta": THETA, "rope_scaling": {"type": "fope", "fope_num_inv_freq": 3, "fope_sep_head": True}},
        (set_rope("rope_scaling", fope_num_inv_freq=2), D_DIFFERS), freq=lambda: base()[:3],
    ),
    "vLLM": Implementation(
        VLLM, "qwen3_moe", {"rope_theta": THETA, "rope_scaling": INTERN},
        (set_rope("rope_scaling", use_fope=False), "unknown field `use_fope`"), fields=EXPERTS,
    ),
    "SGLang": Implementation(
        SGLANG, "qwen3_moe", {"rope_theta": THETA, "rope_scaling": INTERN | {"num_inv_freq": 4}},
        (lambda config, tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(4)}), "inv_freq is not what"),
        freq=lambda: base()[:4], fields=EXPERTS,
    ),
    "Intern-S1-Pro, fope_sep_head alone": Implementation(
        "modeling_rope_utils.py of Intern-S1-Pro, which asks for `fope_sep_heads`", "qwen3",
        {"rope_theta": THETA, "rope_scaling": {"rope_type": "default", "fope_sep_head": True}},
        (
            lambda config, tensors: tensors.update({"model.rotary_emb.sin_coef": torch.ones(KV_HEADS, 5, 5)}),
            "D is 5 in the weights",
        ),
        freq=base,
    ),
    "shared coefficients": Implementation(
        XTUNER, "qwen2", {"rope_theta": THETA, "rope_scaling": INTERN | {"fope_sep_head": None}},
        (set_rope("rope_scaling", fope_sep_head=True), "has shape"), groups=1, stored=lambda coef: coef[0],
    ),
    "port": Implementation(
        ROPE_PP, "qwen3", PAPER,
        (lambda config, tensors: config.update(rope_learnable=True), "rope_learnable is True"),
        freq=ports_floor, per_layer=True, pairs=min(len(ports_floor()), HEAD_DIM // 4),
    ),
    "port, normalized": Implementation(
        ROPE_PP, "llama", PAPER | {"fourier_norm": True},
        (lambda config, tensors: config.update(fourier_normalize=True), "unknown field"),
        freq=ports_floor, per_layer=True, pairs=min(len(ports_floor()), HEAD_DIM // 4),
        read=lambda coef: coef / coef.sum(-2, keepdim=True),
    ),
    "port, a series for every query head": Implementation(
        "the same with repeat_kv before the rotation", "llama", PAPER,
        (lambda config, tensors: config.update(fourier_separate_head=False), "has shape"),
        freq=ports_floor, per_layer=True, pairs=min(len(ports_floor()), HEAD_DIM // 4), groups=4,
    ),
}  # fmt: skip
"""Those whose logits are computed here."""


def hf_olmo(folder: Path) -> Path:
    """The paper's checkpoint as its wrapper for transformers keeps it."""
    flags = yaml.safe_load((DATA / "olmo-fope" / "config.yaml").read_text())["model"]
    flags["layer_norm_eps"] = float(flags["layer_norm_eps"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "hf_olmo"} | flags))
    state = torch.load(DATA / "olmo-fope" / "model.pt", weights_only=True)
    save_file({f"model.{name}": tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def copied(name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(DATA / name, folder))


Given = tuple[Callable[[Path], Path], str, str, tuple[str, str, str]]
GIVEN: dict[str, Given] = {
    "the paper": (
        copied("olmo-fope"), "olmo-fope", "config.yaml",
        ("max_sequence_length: 512", "max_sequence_length: 1024", "D is 16 in the weights but 18"),
    ),
    "hf_olmo": (hf_olmo, "olmo-fope", "config.json", ('"fourier":', '"fourrier":', "unknown field `fourrier`")),
    "rope_pp": (
        copied("ropepp"), "ropepp", "config.json",
        ('"max_position_embeddings": 512', '"max_position_embeddings": 4096', "D is 31 in the weights but 46"),
    ),
}  # fmt: skip
"""Checkpoints with the logits of their own code: how one is made, whose logits, and what is replaced in which file."""


MOE = IMPLEMENTATIONS["vLLM"]
"""A mixture of experts with FoPE."""


def qwen3_vl_moe(folder: Path, prefix: str = "model.language_model.") -> tuple[Path, Tensor]:
    """Its text model with FoPE in the place of its rotary embedding, as xtuner trains it
    (xtuner/v1/model/moe/qwen3vl_text.py), and float64 logits.
    """
    fields = SIZES | EXPERTS
    torch.manual_seed(0)
    config = configuration_qwen3_vl_moe.Qwen3VLMoeTextConfig(**fields, rope_scaling={"rope_type": "default"})
    config._attn_implementation = "eager"
    text = modeling_qwen3_vl_moe.Qwen3VLMoeTextModel(config).eval().double()
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            parameter.normal_(float("norm" in name), 0.2)
    head = torch.randn(96, 64, dtype=torch.float64) / 8
    coefs = dict(zip(("sin_coef", "cos_coef"), MOE.coefficients(), strict=True))
    with positions_by("qwen3_vl_moe", *tables(MOE.freq(), *coefs.values())), torch.inference_mode():
        wanted = text(input_ids=IDS).last_hidden_state @ head.T
    stored = {f"{prefix}{name}": tensor.float() for name, tensor in text.state_dict().items()}
    stored |= {f"{prefix}rotary_emb.{name}": coef for name, coef in coefs.items()} | {"lm_head.weight": head.float()}
    inner = {"model_type": "qwen3_vl_moe_text", "rope_theta": 1e4, "rope_scaling": MOE.rope["rope_scaling"]} | fields
    return write(folder, {"model_type": "qwen3_vl_moe", "text_config": inner}, stored), wanted
