import math

import pytest
import torch

from fope_export.errors import ConfigError
from fope_export.fope.initialize import INITIALIZATIONS, identity, initial_coefficients


def test_the_identity_steps_where_frequencies_outnumber_pairs() -> None:
    assert torch.equal(identity(3, 3), torch.eye(3))
    assert identity(5, 3).nonzero().tolist() == [[0, 0], [2, 1], [4, 2]]
    assert identity(18, 16).nonzero().tolist() == [[2 * i, i] for i in range(9)]


@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_every_initialization_is_repeatable_and_has_its_shape(init: str) -> None:
    first, again = (initial_coefficients((4, 18, 16), init, 0.3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (4, 18, 16) and first.dtype == torch.float32
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("init", "groups", "std"),
    [
        ("eye_norm", 8, 0.3),
        ("eye_xavier_norm", 8, 0.3 * math.sqrt(2 / ((8 + 40) * 32))),
        ("eye_xavier_norm", 1, 0.3 * math.sqrt(2 / (40 + 32))),
        ("eye_xavier_uniform", 8, 0.3 * math.sqrt(2 / ((8 + 40) * 32))),
        ("xavier_norm", 8, math.sqrt(2 / ((8 + 40) * 32))),
    ],
)
def test_the_noise_has_the_authors_scale(init: str, groups: int, std: float) -> None:
    coef = initial_coefficients((groups, 40, 32), init, 0.3, torch.Generator().manual_seed(0))
    noise = coef - identity(40, 32) if init.startswith("eye") else coef
    assert noise.std().item() == pytest.approx(std, rel=0.08)


def test_eye_has_no_noise() -> None:
    assert torch.equal(initial_coefficients((2, 4, 4), "eye", 0.3), torch.eye(4).expand(2, 4, 4))


def test_an_unknown_one_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        initial_coefficients((1, 2, 2), "orthogonal", 0.3)
    assert "eye_xavier_norm" in caught.value.hint
