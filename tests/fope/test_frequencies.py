import math

import msgspec
import numpy as np
import pytest
import torch

from fope_export.errors import ConfigError
from fope_export.fope import frequencies
from fope_export.model.layouts import olmo, paper
from tests.conftest import variant_flags
from tests.support import EPS, FACTOR


@pytest.mark.parametrize(
    ("head_dim", "length", "kept"),
    [(64, 512, 16), (64, 1024, 18), (128, 512, 31), (128, 1024, 36), (64, 256, 13)],
)
def test_the_floor_keeps_what_the_paper_keeps(head_dim: int, length: int, kept: int) -> None:
    freq = frequencies.floor_to_zero(frequencies.exponential(1e4, head_dim), length)
    assert int((freq != 0).sum()) == kept
    assert freq[freq != 0].min() >= 2 * math.pi / length


def test_the_affine_map() -> None:
    freq = frequencies.exponential(1e4, 8, upper=0.5, floor=0.1)
    np.testing.assert_allclose(freq, 0.1 + 0.4 * 1e4 ** (-np.arange(0, 8, 2) / 8), rtol=FACTOR * EPS)


def test_position_interpolation_squeezes() -> None:
    assert torch.equal(frequencies.interpolate(torch.ones(3), 512, 2048), torch.full((3,), 0.25))


def test_yarn_keeps_fast_divides_slow_and_blends_between() -> None:
    freq = frequencies.exponential(1e4, 128)
    extended = frequencies.yarn(freq, 128, 1e4, scale=16, original_length=4096)
    ratio = (extended / freq).numpy()
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 16)
    turns = freq.numpy() * 4096 / (2 * math.pi)
    # A pair of slack at each end: the ramp's ends are rounded to whole pairs.
    assert (ratio[turns > 32 * 1.2] == 1).all() and np.allclose(ratio[turns < 1 / 1.2], 1 / 16)
    assert (np.diff(ratio) <= 0).all()


@pytest.mark.parametrize("name", ["yarn_after", "pi_after"])
def test_extending_a_floored_spectrum_is_what_the_papers_flags_do(name: str) -> None:
    flags = msgspec.convert(variant_flags(name), olmo.OlmoFlags, strict=False)
    sizes = flags.d_model // flags.n_heads, flags.max_sequence_length
    kept = paper.base_frequencies(msgspec.structs.replace(flags, len_extra=False), *sizes)
    wanted = paper.base_frequencies(flags, *sizes)
    original = flags.len_extra_orig_length
    length = flags.max_sequence_length if name == "pi_after" else int(original * flags.len_extra_yarn_scale)
    got = frequencies.extended(
        kept[kept != 0],
        sizes[0],
        flags.len_extra_type.lower(),
        original_length=original,
        length=length,
    )
    torch.testing.assert_close(got, wanted[wanted != 0], rtol=FACTOR * EPS, atol=0)


def test_frequencies_are_not_extended_twice_by_yarn() -> None:
    kept = frequencies.exponential(1e4, 64)[:16]
    once = frequencies.extended(kept, 64, "yarn", original_length=256, length=4096)
    assert once[0] == kept[0] and once[-1] < kept[-1]
    with pytest.raises(ConfigError, match="fall exponentially"):
        frequencies.extended(once, 64, "yarn", original_length=256, length=4096)
