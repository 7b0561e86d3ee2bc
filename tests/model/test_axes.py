"""Positions on several axes in Hugging Face's layout: logits are those of transformers' Qwen3-VL, RoPE and FoPE."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_multimodal_rotary_pos_emb
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLTextRotaryEmbedding

from fope_export.errors import ConfigError
from fope_export.fope import frequencies
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.layouts.hugging_face import weight_map_of
from fope_export.parity.axes import image_between
from tests.model.hugging_face import write
from tests.model.implementations import (
    HEAD_DIM,
    IDS,
    INTERN,
    SIZES,
    THETA,
    above_the_floor,
    base,
    coefficients,
    positions_by,
    tables,
)
from tests.model.theirs import MARGIN, distance
from tests.support import close

SECTIONS = [4, 2, 2]
"""Of a head's 8 frequencies."""
PLACES = torch.from_numpy(np.ascontiguousarray(image_between(IDS.shape[1], 3).T))
"""Positions [A, S], with an image between the tokens."""


def qwen3_vl() -> tuple[Any, Tensor]:
    """Its text model with random weights in float64, and a head."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": SECTIONS, "mrope_interleaved": True}
    config = Qwen3VLTextConfig(**SIZES, rope_theta=THETA, rope_scaling=rope)
    config._attn_implementation = "eager"
    text: Any = Qwen3VLTextModel(config).eval().double()
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            parameter.normal_(float("norm" in name), 0.2)
    return text, torch.randn(SIZES["vocab_size"], SIZES["hidden_size"], dtype=torch.float64) / 8


def their_logits(text: nn.Module, head: Tensor) -> Tensor:
    places = PLACES[:, None].expand(-1, *IDS.shape)
    with torch.inference_mode():
        logits: Tensor = (
            text(input_ids=IDS, attention_mask=torch.ones_like(IDS), position_ids=places).last_hidden_state @ head.T
        )
    return logits


def saved(folder: Path, text: nn.Module, head: Tensor, rope: dict[str, Any], more: dict[str, Tensor]) -> Path:
    stored = {f"model.language_model.{name}": tensor.float() for name, tensor in text.state_dict().items()} | more
    inner = {"model_type": "qwen3_vl_text", "rope_theta": THETA, "rope_scaling": rope} | SIZES
    return write(folder, {"model_type": "qwen3_vl", "text_config": inner}, stored | {"lm_head.weight": head.float()})


def our_logits(folder: Path, places: Tensor = PLACES) -> Tensor:
    model = load_checkpoint(folder).model.double()
    with torch.inference_mode():
        logits: Tensor = model(
            IDS, torch.ones_like(IDS), places[:, None].expand(-1, *IDS.shape), model.empty_cache(len(IDS))
        )[0]
    return logits


def test_an_image_between_the_tokens_is_where_transformers_has_it(tmp_path: Path) -> None:
    text, head = qwen3_vl()
    wanted, rope = their_logits(text, head), {"rope_type": "default", "mrope_section": SECTIONS}
    folder = saved(tmp_path / "right", text, head, rope, {})
    assert distance(our_logits(folder), wanted) < MARGIN
    assert distance(our_logits(folder, PLACES[[0, 2, 1]]), wanted) > 100 * MARGIN
    other = saved(tmp_path / "wrong", text, head, rope | {"mrope_section": [6, 1, 1]}, {})
    assert distance(our_logits(other), wanted) > 100 * MARGIN


def test_with_fope_a_kept_frequency_keeps_its_axis(tmp_path: Path) -> None:
    """The angles of Qwen3-VL's own code, of which FoPE mixes those above the floor."""
    text, head = qwen3_vl()
    freq, coefs = above_the_floor(base()), coefficients(above_the_floor(base()))
    each = PLACES[:, None, :, None].float() * base()
    angles = Qwen3VLTextRotaryEmbedding.apply_interleaved_mrope(text.rotary_emb, each, SECTIONS)[0, :, : len(freq)]
    with positions_by("qwen3_vl", *tables(freq, *coefs, angles=angles)):
        wanted = their_logits(text, head)
    stored = {
        f"model.language_model.rotary_emb.{name}": coef
        for name, coef in zip(("sin_coef", "cos_coef"), coefs, strict=True)
    }
    folder = saved(tmp_path, text, head, INTERN | {"mrope_section": SECTIONS}, stored)
    assert distance(our_logits(folder), wanted) < MARGIN
    for wrong in (PLACES[[1, 0, 2]], PLACES[:1].expand(3, -1)):
        assert distance(our_logits(folder, wrong), wanted) > 100 * MARGIN


def spectrum_of(model_type: str, **rope: Any) -> tuple[int, tuple[int, ...]]:
    config = weight_map_of({"model_type": model_type, "rope_theta": THETA, "rope_scaling": rope} | SIZES).config
    return config.spectrum.axes, config.spectrum.axis


BY_TURNS, IN_SECTIONS = (0, 1, 2, 0, 1, 2, 0, 0), (0, 0, 0, 0, 1, 1, 2, 2)


@pytest.mark.parametrize(
    ("model_type", "rope", "axis"),
    [
        ("qwen3_vl_text", {}, (0, 1, 2, 0, 1, 2, 0, 1)),  # [24, 20, 20], whatever a head has
        ("qwen3_vl_text", {"mrope_section": SECTIONS}, BY_TURNS),
        ("qwen3", {"mrope_section": SECTIONS, "mrope_interleaved": True}, BY_TURNS),
        ("qwen3", {"rope_type": "qwen3_vl", "mrope_section": SECTIONS}, BY_TURNS),
        ("qwen2", {"rope_type": "mrope", "mrope_section": SECTIONS}, IN_SECTIONS),
        ("qwen2", {"mrope_section": SECTIONS, "mrope_interleaved": False}, IN_SECTIONS),
        ("qwen3", {"mrope_section": SECTIONS, "fope_sep_head": True, "num_inv_freq": 3}, (0, 0, 0)),
    ],
    ids=str,
)
def test_what_each_type_means_by_its_sections(model_type: str, rope: dict[str, Any], axis: tuple[int, ...]) -> None:
    assert spectrum_of(model_type, **{"rope_type": "default"} | rope) == (3, axis)


def test_a_plain_model_has_one_axis() -> None:
    assert spectrum_of("qwen3", rope_type="default") == (1, ())


def test_axes_that_take_turns_in_the_code_do_so_whatever_is_said() -> None:
    with pytest.raises(ConfigError, match="mrope_interleaved is false in a model type whose code has the axes take"):
        spectrum_of("qwen3_vl_text", rope_type="default", mrope_interleaved=False)


@pytest.mark.parametrize("axis", [IN_SECTIONS, pytest.param(BY_TURNS, id="the mistake")], ids=str)
def test_sections_are_those_of_qwen2_vl(axis: tuple[int, ...]) -> None:
    plain = Spectrum.rope(frequencies.exponential(THETA, HEAD_DIM).numpy(), HEAD_DIM)
    spectrum = Spectrum.fope(plain.freq, plain.sin_coef, plain.cos_coef, HEAD_DIM, sin_pad=0.0, axes=3, axis=axis)
    q, k, places = torch.randn(1, 30, 4, HEAD_DIM), torch.randn(1, 30, 2, HEAD_DIM), PLACES[:, None, 60:90]
    angles = places[..., None].float() * torch.from_numpy(plain.freq)
    cos, sin = (torch.cat((wave, wave), -1) for wave in (angles.cos(), angles.sin()))
    wanted = apply_multimodal_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin, SECTIONS)
    for got, x in zip(FopeRotary.from_spectrum(spectrum)(q, k, places), wanted, strict=True):
        if axis == IN_SECTIONS:
            close(got, x.transpose(1, 2))
        else:
            assert abs(got - x.transpose(1, 2)).max() > 0.1
