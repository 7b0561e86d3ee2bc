"""A decoder whose weights are the checkpoint's own memory where nothing has to change, and as exported all the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fope_export.config import ExportConfig
from fope_export.errors import CheckpointError, ExportError
from fope_export.model.checkpoint import open_checkpoint
from fope_export.model.conversion import ConvertedWeights
from tests.conftest import small_decoder, write_native

WAYS: dict[str, dict[str, Any]] = {
    "as stored": {}, "half": {"dtype": "fp16"}, "bfloat16": {"dtype": "bf16"}, "folded": {"fold_padding": True},
    "extended": {"extend": "pi", "extend_to": 128},
}  # fmt: skip


class Made:
    """Makes memory, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self.count += 1
        return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("wide", [None, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["native", "tied", "reference"])
def test_a_decoder_is_as_the_converted_one(
    kind: str, way: str, wide: torch.dtype | None, olmo_fope: Path, tmp_path: Path
) -> None:
    folder = olmo_fope
    if kind != "reference":
        folder = write_native(small_decoder(tie_embeddings=kind == "tied"), tmp_path / "checkpoint")
    source, config = open_checkpoint(folder), ExportConfig(**WAYS[way])
    if way == "extended" and source.config.training_length >= 128:
        config = ExportConfig(extend="pi", extend_to=2 * source.config.training_length)
    wanted, made = source.model.converted(config), Made()
    found = ConvertedWeights(source, config).decoder(made, wide)
    assert found.config == wanted.config and not found.training
    assert found.dtype == (wide or wanted.dtype) and (found.lm_head.weight is found.embed.weight) == (
        wanted.lm_head.weight is wanted.embed.weight
    )
    for name, tensor in (wanted if wide is None else wanted.to(wide)).state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    if kind != "reference":
        matrices = 9 if kind == "tied" else 10
        assert made.count == {"as stored": 0, "extended": 0, "folded": 4}.get(way, matrices)


def test_a_mapped_weight_is_checked_too(tmp_path: Path) -> None:
    folder = write_native(small_decoder(), tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["lm_head.weight"][3, 5] = torch.nan
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN"):
        ConvertedWeights(open_checkpoint(folder), ExportConfig()).decoder(Made())
    changed["lm_head.weight"][3, 5] = 1e5
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"lm_head\.weight reaches 100000"):
        ConvertedWeights(open_checkpoint(folder), ExportConfig(dtype="fp16")).decoder(Made())
