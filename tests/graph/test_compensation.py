"""Compensated rounding: of which inputs it takes account, that it helps, and that no weight goes past the next step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import ConfigError, ExportError
from fope_export.graph.compensation import Moments, compensated
from fope_export.graph.measuring import sampled
from fope_export.graph.quantize import read
from fope_export.model.checkpoint import open_checkpoint
from fope_export.model.conversion import ConvertedWeights
from fope_export.model.decoder import Decoder
from tests.conftest import small_decoder, write_native
from tests.support import EPS

WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 17)))
LARGEST = 15


def moments_of(checkpoint: Path, config: ExportConfig) -> Moments:
    source = open_checkpoint(checkpoint)
    return Moments(source.outline.converted(config), ConvertedWeights(source, config), WINDOWS)


def seen_by(model: Decoder) -> dict[str, Tensor]:
    """The same from hooks on the whole model in float64."""
    seen: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, -2).double()}))
    positions = torch.arange(WINDOWS.shape[1]).expand(WINDOWS.shape)
    model(WINDOWS, torch.ones_like(WINDOWS), positions, model.empty_cache(len(WINDOWS)))
    return {name: x.T @ x for name, x in seen.items()}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("fold", [False, True])
def test_moments_are_of_the_inputs_that_the_whole_model_sees(native: Path, dtype: str, fold: bool) -> None:
    config = ExportConfig(dtype=dtype, fold_padding=fold).resolved(64)
    moments, model = moments_of(native, config), open_checkpoint(native).model.converted(config).float()
    for name, wanted in seen_by(model).items():
        got = moments.of(name)
        unit = 64 * EPS * float(wanted.diagonal().max())  # of values that many layers have made
        assert got.dtype == torch.float64 and float((got - wanted).abs().max()) <= unit, name


def a_layer(inputs: int, moments: Tensor, outputs: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in steps from a zero of 8, rounded to the nearest, and compensated."""
    weight = torch.rand(inputs, outputs, generator=torch.Generator().manual_seed(1)) * 14 - 7
    steps = torch.full((inputs // 32, outputs), 0.5)
    zeros = torch.full_like(steps, 8)
    whole = compensated(weight * 0.5, steps, zeros, block=32, largest=LARGEST, moments=moments.clone())
    return weight, weight.round(), whole - 8


def test_inputs_that_have_nothing_to_do_with_each_other_leave_the_nearest() -> None:
    for diagonal in (torch.rand(96, dtype=torch.float64), torch.zeros(96, dtype=torch.float64)):
        _, nearest, whole = a_layer(96, torch.diag(diagonal))
        torch.testing.assert_close(whole, nearest, rtol=0, atol=0)


def test_what_goes_together_is_rounded_together() -> None:
    """Where all inputs are the same, an output is its weights' sum, which is rounded, and not each of them."""
    weight, nearest, whole = a_layer(128, torch.ones(128, 128, dtype=torch.float64))
    left, before = ((rounded - weight).sum(0).abs() for rounded in (whole, nearest))
    assert float(left.max()) < 1 < float(before.mean())
    assert float((whole - weight).abs().max()) < 1


def test_outputs_err_less_than_with_the_nearest_and_no_weight_passes_the_next_step() -> None:
    mixed = torch.randn(500, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = mixed @ torch.randn(24, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight, nearest, whole = a_layer(160, inputs.T @ inputs)
    errors = [float((inputs @ (rounded - weight).double()).norm()) for rounded in (whole, nearest)]
    assert errors[0] < errors[1] / 2
    assert float((whole - weight).abs().max()) < 1 and not torch.equal(whole, nearest)


def test_every_integer_can_be_stored() -> None:
    weight = 20 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    steps, zeros = torch.ones(2, 8), torch.full((2, 8), 3.0)
    whole = compensated(weight, steps, zeros, block=32, largest=LARGEST, moments=torch.ones(64, 64).double())
    assert whole.min() == 0 and whole.max() == LARGEST and torch.equal(whole, whole.round())
    nothing = compensated(0 * weight, 0 * steps, zeros, block=32, largest=LARGEST, moments=torch.eye(64).double())
    assert torch.equal(nothing, torch.full((64, 8), 3.0))


def test_inputs_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = small_decoder()
    model.get_parameter("layers.1.attn_norm.weight")[0] = 3e38
    checkpoint = write_native(model, tmp_path / "checkpoint")
    moments = moments_of(checkpoint, ExportConfig().resolved(64))
    assert moments.of("layers.0.feed_forward.ff_out").isfinite().all()
    with pytest.raises(ExportError, match=r"inputs of layers\.1\.attention\.att_proj are not finite") as caught:
        moments.of("layers.1.attention.att_proj")
    assert "--calibration FILE" in caught.value.hint


def test_it_is_what_is_usual_where_there_is_text_for_it(native: Path, tmp_path: Path) -> None:
    bare, ids = write_native(small_decoder(), tmp_path / "bare"), tmp_path / "ids.npy"
    (bare / "tokenizer.json").unlink()
    np.save(ids, WINDOWS.numpy())

    def chosen(checkpoint: Path, file: Path | None = None, **options: Any) -> tuple[str | None, int | None, bool]:
        config, windows = sampled(open_checkpoint(checkpoint), ExportConfig(**options).resolved(64), file)
        return config.rounding, config.block, windows is not None

    assert chosen(native, quantize="int4") == ("compensated", 128, True)
    assert chosen(native, quantize="int4", rounding="nearest", block=64) == ("nearest", 64, False)
    assert chosen(bare, quantize="int4") == ("nearest", 128, False)
    assert chosen(bare, ids, quantize="int4") == ("compensated", 128, True)
    assert chosen(native, quantize="int8", block=256) == ("nearest", 256, False)
    assert chosen(native, ids, quantize="int8") == ("compensated", 128, True)
    assert chosen(native, quantize="int8-qdq") == (None, None, True)
    assert chosen(native) == (None, None, False)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        chosen(bare, quantize="int4", rounding="compensated")
    with pytest.raises(ConfigError, match="calibrates nothing"):
        chosen(native, ids, quantize="int4", rounding="nearest")


def test_both_are_asked_for_by_name_and_have_the_same_steps(native: Path, tmp_path: Path) -> None:
    made = []
    for name in ("nearest", "compensated"):
        options = ["--quantize", "int4", "--rounding", name, "--block", "64"]
        assert main(["export", str(native), str(tmp_path / name), *options]) == 0
        made.append(list(read(Bundle.open(tmp_path / name).model)))
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one.allowed, other.allowed)
        assert (np.abs(one.weight - other.weight) <= 2.01 * one.allowed).all() and (one.weight != other.weight).any()
