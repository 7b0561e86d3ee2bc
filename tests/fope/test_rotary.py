"""The torch operator and module against the definition."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fope_export.errors import ConfigError
from fope_export.fope import contract, reference
from fope_export.fope.rotary import FopeRotary, normalized, rotary
from fope_export.fope.spectrum import Spectrum
from tests.fope.rotations import ALL, GENERAL, SHAPES, THREE, VARIANTS, make
from tests.support import EPS, close, rotated_within


@pytest.mark.parametrize(("shape", "fields"), ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_definition(shape: tuple[int, ...], fields: dict[str, Any], dtype: torch.dtype) -> None:
    spectrum, q, k, positions = make(shape, **fields)
    q, k = q.to(dtype), k.to(dtype)
    rotated = FopeRotary.from_spectrum(spectrum)(q, k, positions)
    for got, x in zip(rotated, (q, k), strict=True):
        wanted = reference.rotate(spectrum, x.double().numpy(), positions.numpy())
        assert got.dtype == dtype and got.shape == x.shape
        result = torch.finfo(dtype).eps
        rotated_within(
            got.double(), wanted, spectrum, x.double().numpy(), positions.numpy(),
            series=min(result, EPS), result=result,
        )  # fmt: skip
        assert torch.equal(got[..., spectrum.config.rotary_dim :], x[..., spectrum.config.rotary_dim :])


@pytest.mark.parametrize(("shape", "fields", "whole"), GENERAL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extensions_are_the_definition(
    shape: tuple[int, ...], fields: dict[str, Any], whole: bool, dtype: torch.dtype
) -> None:
    test_it_is_the_definition(shape, fields | {"whole": whole}, dtype)


@pytest.mark.parametrize("axis", [THREE["axis"], (0,) * 9], ids=str)
def test_one_position_stands_on_every_axis(axis: tuple[int, ...]) -> None:
    """And turns as without axes, to the last bit."""
    spectrum, q, k, _ = make(SHAPES[1], axes=3, axis=axis)
    plain, *_, positions = make(SHAPES[1])
    rotary_module = FopeRotary.from_spectrum(spectrum)
    wanted = FopeRotary.from_spectrum(plain)(q, k, positions)
    for given in (positions, positions.expand(3, -1, -1)):
        for got, x in zip(rotary_module(q, k, given), wanted, strict=True):
            assert torch.equal(got, x)


def test_a_phase_per_pair_is_a_mixture_of_both_bases() -> None:
    """cos(a - p) = cos(p) cos(a) + sin(p) sin(a), and sin(a - p) = cos(p) sin(a) - sin(p) cos(a)."""
    freq, phases = np.array([1.5, 0.5, 0.25], np.float32), np.array([0.3, -1.2, 2.0])
    cos, sin = np.diag(np.cos(phases)), np.diag(np.sin(phases))
    sines, cosines = (np.concatenate(parts)[None].astype(np.float32) for parts in ((cos, -sin), (sin, cos)))
    shifted = FopeRotary.from_spectrum(Spectrum.fope(freq, sines, cosines, 8, bases=2, sin_pad=0.0))
    q, k, positions = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8), torch.arange(5)[None]
    angles = positions[0, :, None].numpy() * freq.astype(np.float64) - phases
    for got, x in zip(shifted(q, k, positions), (q, k), strict=True):
        left, right = x[0, :, :, :3].double().numpy(), x[0, :, :, 4:7].double().numpy()
        wanted = left * np.cos(angles)[:, None] - right * np.sin(angles)[:, None]
        close(got[0, :, :, :3], wanted)


@pytest.mark.parametrize(
    ("fields", "positions", "message"),
    [
        (THREE, torch.zeros(2, 2, 7, dtype=torch.int64), "position_ids has 2 axes, and the spectrum has 3"),
        ({}, torch.zeros(1, 2, 7, dtype=torch.int64), "position_ids has 1 axes, and the spectrum has 1"),
        ({}, torch.zeros(2, 7, dtype=torch.float16), "position_ids is torch.float16, which rounds positions"),
        (THREE, torch.zeros(3, 2, 7, dtype=torch.bfloat16), "position_ids is torch.bfloat16, which rounds"),
        ({}, torch.zeros(2, 7, requires_grad=True), "positions take no gradient"),
    ],
    ids=str,
)
def test_positions_of_another_kind_are_refused(fields: dict[str, Any], positions: Tensor, message: str) -> None:
    spectrum, q, k, _ = make(SHAPES[1], **fields)
    with pytest.raises(ConfigError, match=message):
        FopeRotary.from_spectrum(spectrum)(q, k, positions)


def test_a_fresh_one_may_be_extended_and_begins_as_a_plain_one() -> None:
    extensions: list[dict[str, Any]] = [{}, {"sections": (6, 5, 5), "bases": 2}]
    made = [
        FopeRotary.create(
            head_dim=32, groups=2, training_length=256, generator=torch.Generator().manual_seed(0), **fields
        )
        for fields in extensions
    ]
    config = made[1].spectrum.config
    assert (config.axes, config.bases, config.axis) == (3, 2, tuple(d % 3 for d in range(config.frequencies)))
    q, k, positions = torch.randn(1, 5, 2, 32), torch.randn(1, 5, 2, 32), torch.arange(5)[None]
    for got, wanted in zip(made[1](q, k, positions), made[0](q, k, positions), strict=True):
        close(got, wanted)
    places = torch.stack((positions, positions + 1, positions + 2))
    assert not torch.allclose(made[1](q, k, places)[0], made[0](q, k, positions)[0], atol=1e-2)


def test_an_axis_is_no_weight() -> None:
    """The configuration has it, so that a plain checkpoint's tensors are those of one with axes."""
    spectrum, *_ = make(SHAPES[1], **THREE)
    with torch.device("meta"):
        part = FopeRotary(spectrum.config)
    assert part.axis is not None and part.axis.tolist() == [*THREE["axis"]]
    assert part.state_dict().keys() == FopeRotary.from_spectrum(make(SHAPES[1])[0]).state_dict().keys()


def test_without_full_precision_the_rotation_itself_is_in_the_models_dtype() -> None:
    spectrum, q, k, positions = make(SHAPES[0], full_precision=False)
    full, *_ = make(SHAPES[0])
    half = [FopeRotary.from_spectrum(s)(q.half(), k.half(), positions)[0] for s in (spectrum, full)]
    assert half[0].dtype == torch.float16
    assert not torch.equal(*half)
    wanted = reference.rotate(spectrum, q.half().double().numpy(), positions.numpy())
    for got, roundings in zip(half, (3, 1), strict=True):  # of tables, products and sums; of the result alone
        off = roundings * torch.finfo(torch.float16).eps
        rotated_within(
            got.double(), wanted, spectrum, q.half().double().numpy(), positions.numpy(), series=EPS, result=off
        )


EXTENDED = [
    {"bases": 2, "sign": -1},
    {"axes": 2, "axis": (1, 0, 0, 1, 1), "bases": 2, "whole": False, "pairing": "interleaved"},
]


@pytest.mark.parametrize("fields", [*VARIANTS[2:], {"rotary_dim": 6}, *EXTENDED], ids=str)
def test_gradients(fields: dict[str, Any]) -> None:
    spectrum, q, k, positions = make((4, 2, 2, 8, 5, 3), **fields)
    leaves = [t.double().requires_grad_() for t in (q, k)]
    coefs = [torch.from_numpy(c).double().requires_grad_() for c in (spectrum.sin_coef, spectrum.cos_coef)]
    told = axis_of(spectrum), *contract.settings(spectrum.config).values()
    arguments: tuple[Any, ...] = (*leaves, positions, torch.from_numpy(spectrum.freq), *coefs, *told)
    assert torch.autograd.gradcheck(rotary, arguments)


def axis_of(spectrum: Spectrum) -> Tensor | None:
    return FopeRotary.from_spectrum(spectrum).axis


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fields", [{}, THREE], ids=str)
def test_the_operator_is_registered_as_torch_wants_it(fields: dict[str, Any]) -> None:
    spectrum, q, k, positions = make(SHAPES[1], **fields)
    coefs = [torch.from_numpy(c).requires_grad_() for c in (spectrum.sin_coef, spectrum.cos_coef)]
    told = axis_of(spectrum), *contract.settings(spectrum.config).values()
    arguments = (q.requires_grad_(), k, positions, torch.from_numpy(spectrum.freq), *coefs, *told)
    results = torch.library.opcheck(rotary, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_casting_a_model_leaves_the_numbers_in_float32() -> None:
    part = FopeRotary.create(head_dim=16, groups=2, training_length=64)
    module, before = nn.Sequential(nn.Linear(2, 2), part), part.spectrum
    module.half().double().bfloat16()
    assert module[0].weight.dtype == torch.bfloat16
    assert {t.dtype for t in part.state_dict().values()} == {torch.float32}
    np.testing.assert_array_equal(part.spectrum.sin_coef, before.sin_coef)


def test_normalization_divides_by_the_sum_over_frequencies() -> None:
    rotary_module = FopeRotary.create(head_dim=16, groups=2, training_length=64, normalize=True)
    spectrum = rotary_module.spectrum
    np.testing.assert_allclose(spectrum.sin_coef.sum(axis=1), 1, rtol=1e-5)
    assert torch.equal(torch.from_numpy(spectrum.cos_coef), normalized(rotary_module.cos_coef))


class Attention(nn.Module):
    """Somebody's own attention, with FoPE where RoPE stood."""

    def __init__(self, learnable: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 8)
        generator = torch.Generator().manual_seed(3)
        self.rotary = FopeRotary.create(
            head_dim=16, groups=2, training_length=32, learnable=learnable, generator=generator
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k = self.rotary(q, k, torch.arange(x.shape[1]).expand(x.shape[:2]))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("learnable", [False, True])
def test_a_foreign_model_trains_with_it(learnable: bool) -> None:
    torch.manual_seed(0)
    model = Attention(learnable)
    before = model.rotary.spectrum
    x, target = torch.randn(8, 32, 32), torch.randint(0, 8, (8, 32))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = np.abs(model.rotary.spectrum.sin_coef - before.sin_coef).max()
    assert (moved > 1e-3) == learnable


@pytest.mark.parametrize(("head_dim", "length"), [(64, 6), (2, 512)])
def test_nothing_to_rotate_is_an_error(head_dim: int, length: int) -> None:
    with pytest.raises(ConfigError, match="completes a period"):
        FopeRotary.create(head_dim=head_dim, groups=1, training_length=length)


def test_ports_and_settings_are_the_contracts() -> None:
    schema = torch.ops.fope.rotary.default._schema
    names, ports = [argument.name for argument in schema.arguments], contract.INPUTS[contract.GENERAL]
    assert names == [port.name for port in ports] + [*contract.SETTINGS]
    assert [str(a.type) for a in schema.arguments[: len(ports)]] == ["Tensor"] * 6 + ["Optional[Tensor]"]
    kinds = {"float": float, "bool": bool, "int": int}
    settings = {a.name: kinds[str(a.type)] for a in schema.arguments[len(ports) :]}
    assert settings == {name: setting.kind for name, setting in contract.SETTINGS.items()}
    assert [str(r.type) for r in schema.returns] == ["Tensor"] * len(contract.OUTPUTS)
