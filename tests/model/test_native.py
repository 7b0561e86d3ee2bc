from pathlib import Path

import pytest
import torch

from fope_export.errors import ConfigError
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.layouts.native import save
from tests.conftest import small_decoder


@pytest.mark.parametrize("kind", ["fope", "rope"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_is_loaded(kind: str, tied: bool, tmp_path: Path) -> None:
    model = small_decoder(kind, tie_embeddings=tied)
    save(model, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.layout == "native" and loaded.config == model.config
    for (name, left), right in zip(model.state_dict().items(), loaded.model.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert (loaded.model.lm_head.weight is loaded.model.embed.weight) == tied


def test_rounded_weights_leave_the_rotations_numbers_alone(tmp_path: Path) -> None:
    model = small_decoder()
    save(model, tmp_path, dtype=torch.float16)
    loaded = load_checkpoint(tmp_path).model
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    before, after = model.attentions()[1].rotary, loaded.attentions()[1].rotary
    assert torch.equal(before.sin_coef, after.sin_coef) and torch.equal(before.freq, after.freq)
    assert torch.equal(model.embed.weight.half().float(), loaded.embed.weight)


def test_normalized_coefficients_are_saved_as_what_they_stand_for(tmp_path: Path) -> None:
    model = small_decoder()
    for attention in model.attentions():
        attention.rotary.normalize = True
    save(model, tmp_path)
    for before, after in zip(model.attentions(), load_checkpoint(tmp_path).model.attentions(), strict=True):
        assert (before.rotary.spectrum.sin_coef == after.rotary.spectrum.sin_coef).all()


def test_a_rotation_that_the_configuration_does_not_state_is_refused(tmp_path: Path) -> None:
    model = small_decoder()
    model.attentions()[1].rotary = small_decoder("rope").attentions()[1].rotary
    with pytest.raises(ConfigError, match="layer 1 has"):
        save(model, tmp_path)
