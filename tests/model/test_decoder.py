import copy
from typing import Any

import pytest
import torch

from fope_export.config import ExportConfig
from fope_export.graph.export import trace
from fope_export.model.decoder import Decoder, causal_mask, static_mask, write
from tests.conftest import small_decoder
from tests.support import same_function, truth_of

WEIGHTS = {"embed", "lm_head", "att_proj", "attn_out", "ff_proj", "ff_out", "attn_norm", "ff_norm", "norm"}
"""All but the rotation's numbers, which no conversion but another frequency changes."""


def logits(model: Decoder, ids: torch.Tensor, mask: torch.Tensor, steps: tuple[int, ...]) -> torch.Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, start, parts = model.empty_cache(len(ids)), 0, []
    for step in steps:
        end = start + step
        part, cache = model(ids[:, start:end], mask[:, :end], positions[:, start:end], cache)
        parts.append(part)
        start = end
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("steps", [(17, 3), (1,) * 20, (5, 1, 14)], ids=str)
def test_steps_from_the_cache_give_what_the_whole_gives(heads: int, kv_heads: int, steps: tuple[int, ...]) -> None:
    model = small_decoder(heads=heads, kv_heads=kv_heads)
    ids = torch.randint(0, 256, (2, 20))
    mask, truth = torch.ones_like(ids), truth_of(model, ids.numpy())
    same_function(logits(model, ids, mask, steps), logits(model, ids, mask, (20,)), truth)


def test_padding_on_the_left_changes_nothing() -> None:
    model = small_decoder()
    ids = torch.randint(0, 256, (1, 9))
    alone = logits(model, ids, torch.ones_like(ids), (9,))
    padded_ids = torch.cat((torch.full((1, 4), 7), ids), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    padded = logits(model, padded_ids, mask, (10, 3))[:, 4:]
    same_function(padded, alone, truth_of(model, ids.numpy()))


def test_the_mask_is_causal_and_finite() -> None:
    mask = causal_mask(torch.tensor([[0, 1, 1, 1]]), 2, torch.float16)
    assert (mask == 0).tolist() == [[[[False, True, True, False], [False, True, True, True]]]]
    assert mask.isfinite().all() and mask.dtype == torch.float16


def test_tied_embeddings_are_one_tensor() -> None:
    model = small_decoder(tie_embeddings=True)
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize("width", [0, 30], ids=["as wide as the tokens", "as wide as the cache"])
@pytest.mark.parametrize("steps", [(20,), (13, 1, 6), (1,) * 20], ids=str)
def test_a_static_cache_changes_nothing(steps: tuple[int, ...], width: int) -> None:
    model = small_decoder(kv_heads=2)
    ids = torch.randint(0, 256, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :14] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted, truth = logits(model, ids, mask, (20,)), truth_of(model, ids.numpy(), mask.numpy())
    model.capacity = 30
    cache, start = model.empty_cache(3), 0
    for step in steps:
        end = start + step
        seen = torch.nn.functional.pad(mask[:, :end], (0, max(width - end, 0)))
        part, cache = model(ids[:, start:end], seen, positions[:, start:end], cache)
        real = mask[:, start:end] != 0
        same_function(part[real], wanted[:, start:end][real], truth[:, start:end][real])
        start = end
    assert all(tensor.shape == (3, 2, 30, 16) and tensor.isfinite().all() for pair in cache for tensor in pair)


def test_the_static_mask_ends_at_a_rows_last_token() -> None:
    mask, written = static_mask(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]), 2, torch.float32, 5)
    assert written.tolist() == [1, 2, 0]
    assert (mask[:2, 0] == 0).int().tolist() == [
        [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
    ]


def test_writing_is_a_registered_operator() -> None:
    past, new = torch.zeros(2, 3, 8, 4), torch.randn(2, 3, 2, 4)
    written = torch.tensor([0, 6])
    torch.library.opcheck(write, (past, new, written))
    out = write(past, new, written)
    assert torch.equal(out[0, :, :2], new[0]) and torch.equal(out[1, :, 6:], new[1])
    assert out.count_nonzero() == new.count_nonzero() and not past.any()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_rotations_numbers_stay_float32(dtype: str) -> None:
    model = small_decoder().converted(ExportConfig(dtype=dtype))
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == {name for name in model.state_dict() if ".rotary." in name}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "fields", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"qk_norm": True, "qkv_bias": True}], ids=str
)
def test_folded_padding_changes_no_logit(fields: dict[str, Any], dtype: str) -> None:
    model = small_decoder(kv_heads=2, **fields)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(torch.randn(parameter.shape))
    ids = torch.randint(0, 256, (2, 20))
    mask = torch.ones_like(ids)
    truth = truth_of(model, ids.numpy())
    plain = logits(model.converted(ExportConfig(dtype=dtype)), ids, mask, (20,)).float()
    folded = model.converted(ExportConfig(dtype=dtype, fold_padding=True))
    assert folded.config.spectrum == folded.attentions()[1].rotary.config and folded.config.spectrum.rotary_dim == 6
    same_function(logits(folded, ids, mask, (13, 7)).float(), plain, truth)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied"])
@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (ExportConfig(), set[str]()),
        (ExportConfig(extend="yarn", extend_to=256), {"freq"}),
        (ExportConfig(fold_padding=True), {"att_proj"}),
        (ExportConfig(dtype="fp16", extend="pi", extend_to=256, fold_padding=True), {"freq", *WEIGHTS}),
    ],
    ids=["nothing", "frequencies", "projections", "everything"],
)
def test_conversion_leaves_its_source_and_copies_what_it_changes(
    config: ExportConfig, changed: set[str], tied: bool
) -> None:
    model = small_decoder(tie_embeddings=tied)
    before, known, rotaries = copy.deepcopy(model.state_dict()), model.config, [a.rotary for a in model.attentions()]
    made = model.converted(config)
    made.capacity = 99
    assert model.config == known and model.capacity == 0 and [a.rotary for a in model.attentions()] == rotaries
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
        shared = tensor.data_ptr() == made.state_dict()[name].data_ptr()
        assert shared != any(part in changed for part in name.split(".")), name
    for attention in made.attentions():
        attention.att_proj.weight = torch.nn.Parameter(attention.att_proj.weight + 1, requires_grad=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (made.lm_head.weight is made.embed.weight) == tied


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = small_decoder()
    trace(model, capacity=32)
    assert model.capacity == 0 and model.empty_cache(1)[0][0].shape[2] == 0
