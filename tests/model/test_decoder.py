import pytest
import torch

from fope_export.model.decoder import Decoder, causal_mask
from tests.conftest import small_decoder


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
    mask = torch.ones_like(ids)
    torch.testing.assert_close(logits(model, ids, mask, steps), logits(model, ids, mask, (20,)), rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_nothing() -> None:
    model = small_decoder()
    ids = torch.randint(0, 256, (1, 9))
    alone = logits(model, ids, torch.ones_like(ids), (9,))
    padded_ids = torch.cat((torch.full((1, 4), 7), ids), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    padded = logits(model, padded_ids, mask, (10, 3))[:, 4:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_the_mask_is_causal_and_finite() -> None:
    mask = causal_mask(torch.tensor([[0, 1, 1, 1]]), 2, torch.float16)
    assert (mask == 0).tolist() == [[[[False, True, True, False], [False, True, True, True]]]]
    assert mask.isfinite().all() and mask.dtype == torch.float16


def test_tied_embeddings_are_one_tensor() -> None:
    model = small_decoder(tie_embeddings=True)
    assert model.lm_head.weight is model.embed.weight
