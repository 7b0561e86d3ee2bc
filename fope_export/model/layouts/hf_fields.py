"""The fields of a Hugging Face config.json that decide what is computed, and what a model type means without one."""

from collections.abc import Mapping
from typing import Any

import msgspec

from fope_export.config import Channels, Checked, Count, Layers, Positive, Size, convert
from fope_export.errors import ConfigError
from fope_export.model.layouts.base import only_supported, without_clashes
from fope_export.model.layouts.paper import PaperFlags


class Kind(msgspec.Struct, frozen=True):
    """What a model type means that its config.json does not say."""

    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: attention_bias decides
    experts: bool = False
    fused_in_out: bool = False  # experts stored as one tensor are [E, inputs, outputs], else [E, outputs, inputs]
    groups: bool = False  # its router knows router_n_groups
    normalized: bool = False  # its router always normalizes
    turns: tuple[int, ...] = ()  # its mrope_section where none is given; its axes take turns in any case
    silent: dict[str, Any] = {}  # the class's own values of fields that are left out


KINDS = {
    "llama": Kind(),
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(qk_norm=True, silent={"head_dim": 128}),
    "qwen3_moe": Kind(qk_norm=True, experts=True, silent={"norm_topk_prob": False}),
    "qwen3_moe_fope": Kind(qk_norm=True, experts=True, silent={"norm_topk_prob": False}),
    "qwen3_vl_text": Kind(qk_norm=True, turns=(24, 20, 20), silent={"head_dim": 128}),
    "qwen3_vl_moe_text": Kind(
        qk_norm=True,
        experts=True,
        fused_in_out=True,
        normalized=True,
        turns=(24, 20, 20),
        silent={"norm_topk_prob": True},
    ),
    "interns1_pro_text": Kind(qk_norm=True, experts=True, groups=True, silent={"norm_topk_prob": True}),
}
MULTIMODAL = dict.fromkeys(("interns1_pro", "qwen3_vl", "qwen3_vl_moe"), "text_config")
"""Model types whose language model is described in a section of config.json."""
LACKING = dict.fromkeys(
    ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"),
    "linear attention (gated delta networks) and gated attention in most of its layers",
)
"""Model types that FoPE is trained in, and what their decoders have that ours has not."""


class HfFlags(Checked, frozen=True, kw_only=True):
    """The fields that decide what is computed. A default is that of every model type; where these differ, `Kind.silent`
    has theirs, or the field is required, as sizes are.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Channels | None = None
    max_position_embeddings: Count
    rms_norm_eps: Positive
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    num_experts: Size | None = None
    num_experts_per_tok: Size = 0
    moe_intermediate_size: Size = 0
    norm_topk_prob: bool = False
    router_n_groups: int = 0
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[Size] | None = None

    # Each must have the value that REQUIRED states.
    hidden_act: str = "silu"
    mlp_bias: bool = False
    pretraining_tp: int = 1
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    rope_type: str | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def channels(self) -> int:
        """Of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def pad(self) -> int | None:
        """The padding token; one outside the vocabulary can never occur, and is none."""
        inside = self.pad_token_id is not None and 0 <= self.pad_token_id < self.vocab_size
        return self.pad_token_id if inside else None


REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_sliding_window": (False,),
    "rope_type": ("default", None),
}
"""Fields with one supported value."""

WITHOUT_EFFECT = frozenset(
    "architectures attention_dropout auto_map bos_token_id dtype gradient_checkpointing ignore_index init_device "
    "initializer_range max_window_layers model_type output_router_logits router_aux_loss_coef sliding_window "
    "torch_dtype transformers_version use_cache _name_or_path _attn_implementation _attn_implementation_autoset "
    "_experts_implementation _commit_hash attn_implementation finetuning_task id2label label2id output_attentions "
    "output_hidden_states problem_type return_dict task_specific_params tokenizer_class torchscript unsloth_fixed "
    "unsloth_version use_bfloat16 base_model_tp_plan base_model_pp_plan keys_to_ignore_at_inference "
    "router_jitter_noise image_token_id video_token_id vision_start_token_id vision_end_token_id".split()
)
"""Fields that change nothing in what a trained model computes, and those that are read elsewhere."""
SYNONYMS = {"num_local_experts": "num_experts"}
"""Names of fields in other versions of transformers."""
PAPER_FIELDS = frozenset(PaperFlags.__struct_fields__) - {"rope_theta"}
"""Fields that only ports of the paper's code have: any of them makes a model one."""
MEANINGS = {
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), "bounds logits by a hyperbolic tangent"),
    **dict.fromkeys(("query_pre_attn_scalar", "attention_multiplier", "attn_scale"), "scales attention's logits"),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb", "scale_depth"),
        "scales embeddings, residuals or logits",
    ),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts"), "adds an expert that sees every token"),
    **dict.fromkeys(
        ("scoring_func", "topk_method", "n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace"),
        "belongs to another router of experts",
    ),
    **dict.fromkeys(
        ("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim", "full_attention_interval"),
        "belongs to linear attention",
    ),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "qk_norm"), "normalizes queries and keys"),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_num_hidden_layers"), "adds layers that predict further tokens"),
    **dict.fromkeys(("attention_chunk_size", "no_rope_layers", "attention_sink"), "changes what a token attends to"),
    **dict.fromkeys(("clip_qkv", "attn_output_gate"), "changes queries, keys or values"),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"), "belongs to latent attention"),
}
"""What fields do in models of other kinds, for the message that refuses them."""


def fields_of(data: Mapping[str, Any], where: str) -> tuple[HfFlags, dict[str, Any]]:
    """The fields of a config.json, and apart from them the flags of the paper's code that it has.

    Raises ConfigError naming all fields that are unknown, or the first that says nothing this layout supports.
    """
    kind = KINDS[data["model_type"]]
    known = {*HfFlags.__struct_fields__, *PAPER_FIELDS}
    fields = dict(kind.silent)
    for name, value in data.items():
        name = SYNONYMS.get(name, name)
        if name in WITHOUT_EFFECT or (value is None and name not in known):
            continue
        if name in SYNONYMS.values() and data.get(name, value) != value:
            raise ConfigError(f"{where}: {name} is {data[name]!r} and {value!r}", hint="Keep the one that is right.")
        fields[name] = value
    port = {name: fields.pop(name) for name in sorted(PAPER_FIELDS & fields.keys())}
    return convert(fields, HfFlags, where=where, meanings=MEANINGS), port


def check(flags: HfFlags, kind: Kind) -> None:
    """Raises ConfigError naming the first field, or pair of fields, that this layout does not support."""
    only_supported(flags, REQUIRED)
    odd = [kind for kind in flags.layer_types or () if kind != "full_attention"]
    without_clashes(
        {
            f"layer_types has {odd[:1]}, and only full_attention is supported": odd,
            "hidden_size is not a multiple of num_attention_heads, and head_dim is not given": not flags.head_dim
            and flags.hidden_size % flags.num_attention_heads,
            "num_experts in a model type without experts": flags.num_experts and not kind.experts,
            "num_experts is not given": kind.experts and flags.num_experts is None,
            "num_experts needs num_experts_per_tok and moe_intermediate_size": flags.num_experts
            and not (flags.num_experts_per_tok and flags.moe_intermediate_size),
            "router_n_groups in a model type whose router has none": flags.router_n_groups > 1 and not kind.groups,
            "norm_topk_prob is false in a model type whose code always normalizes": kind.normalized
            and not flags.norm_topk_prob,
        }
    )
