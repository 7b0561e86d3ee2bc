"""Replacing somebody else's rotation: what computes the same takes its place, what does not is refused by its path."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, apply_rotary_pos_emb

from fope_export.errors import ConfigError
from fope_export.fope import frequencies
from fope_export.fope.replace import replace_rotary
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum

HEADS, WIDTH = 2, 16
ROTARY = FopeRotary.create(
    head_dim=WIDTH, groups=HEADS, training_length=64, generator=torch.Generator().manual_seed(0)
).eval()


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """FoPE of x [B, H, S, E] at positions [B, S] or [S], as Hugging Face's models write it."""
    angles = positions.float()[..., None] * ROTARY.freq
    rest = (0, WIDTH // 2 - ROTARY.sin_coef.shape[-1])
    sin, cos = (
        nn.functional.pad(torch.einsum("...sd,hdf->...hsf", wave, coef), rest, value=1.0).repeat_interleave(
            x.shape[1] // HEADS, -3
        )
        for wave, coef in ((angles.sin(), ROTARY.sin_coef), (angles.cos(), ROTARY.cos_coef))
    )
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def ours(q: Tensor, k: Tensor, positions: Tensor, rotary: FopeRotary = ROTARY) -> tuple[Tensor, Tensor]:
    """The same by FopeRotary."""
    rows = positions.expand(len(q), -1)
    q, k = rotary(q.transpose(1, 2), k.transpose(1, 2), rows)
    return q.transpose(1, 2), k.transpose(1, 2)


class Explicit(nn.Module):
    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return turned(q, position_ids), turned(k, position_ids)


class Optional(nn.Module):
    """Positions from an offset, and none means from 0; keyword only."""

    def forward(self, query: Tensor, key: Tensor, *, offset: int = 0) -> tuple[Tensor, Tensor]:
        positions = torch.arange(offset, offset + query.shape[2])
        return turned(query, positions), turned(key, positions)


class Single(nn.Module):
    """One tensor at a time, sequence first, and the length beside it."""

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        return turned(x.transpose(1, 2), torch.arange(seq_len or x.shape[1])).transpose(1, 2)


class Anything(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k = tensors
        return turned(q, torch.arange(q.shape[2])), turned(k, torch.arange(q.shape[2]))


class Grouped(nn.Module):
    """Four queries' heads share a key's, and nothing else is taken."""

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        assert q.shape[1] == 4 * k.shape[1] == 4 * HEADS
        return turned(q, position_ids), turned(k, position_ids)


Forward = Callable[..., Any]


def adapter(forward: Forward, **changes: Any) -> Callable[[nn.Module], nn.Module]:
    """Makes a module that has a FopeRotary with `changes` of its configuration, and calls `forward(rotary, …)`."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = FopeRotary.from_spectrum(ROTARY.spectrum)
            self.rotary.config = msgspec.structs.replace(self.rotary.config, **changes)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return forward(self.rotary, *args, **kwargs)

    return lambda part: Adapter()


def explicit(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    return ours(q, k, positions, rotary)


def optional(rotary: FopeRotary, q: Tensor, k: Tensor, offset: int = 0) -> Any:
    return ours(q, k, torch.arange(offset, offset + q.shape[2]), rotary)


def single(rotary: FopeRotary, x: Tensor, seq_len: int | None = None) -> Tensor:
    turned: Tensor = rotary(x, x, torch.arange(seq_len or x.shape[1]).expand(len(x), -1))[0]
    return turned


def implicit(rotary: FopeRotary, q: Tensor, k: Tensor) -> Any:
    return ours(q, k, torch.arange(q.shape[2]), rotary)


KINDS: dict[str, tuple[type[nn.Module], Forward]] = {
    "explicit positions": (Explicit, explicit),
    "an offset by name": (Optional, optional),
    "one tensor, sequence first": (Single, single),
    "any arguments": (Anything, implicit),
    "grouped queries": (Grouped, explicit),
}


def around(part: nn.Module) -> nn.Module:
    return nn.ModuleDict({"block": nn.ModuleList([nn.Linear(2, 2), part])}).eval()


@pytest.mark.parametrize(("kind", "forward"), KINDS.values(), ids=KINDS)
def test_the_same_rotation_takes_the_place(kind: type[nn.Module], forward: Forward) -> None:
    model = around(kind())
    assert replace_rotary(model, kind, adapter(forward)) == 1
    assert not isinstance(model.get_submodule("block.1"), kind)


CHANGES: dict[str, dict[str, Any]] = {
    "pad of the sine": {"sin_pad": 0.0},
    "pad of the cosine": {"cos_pad": 0.99},
    "sign": {"sign": -1},
    "pairing": {"pairing": "interleaved"},
}


@pytest.mark.parametrize(
    ("kind", "forward", "changes"),
    [
        *((*pair, CHANGES["pad of the sine"]) for pair in KINDS.values()),
        *((Explicit, explicit, changes) for changes in CHANGES.values()),
    ],
    ids=[*KINDS, *CHANGES],
)
def test_another_rotation_is_refused(kind: type[nn.Module], forward: Forward, changes: dict[str, Any]) -> None:
    part = kind()
    model = around(part)
    with pytest.raises(ConfigError, match=rf"block\.1: what replaces {kind.__name__} is not the same: off by .*%"):
        replace_rotary(model, kind, adapter(forward, **changes))
    assert model.get_submodule("block.1") is part
    assert replace_rotary(model, kind, adapter(forward, **changes), same=False) == 1


def swapped_heads(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    return tuple(x.flip(1) for x in ours(q.flip(1), k.flip(1), positions, rotary))


def one_later(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    return ours(q, k, positions + 1, rotary)


def first_row(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    return ours(q, k, positions[:1] if positions.ndim == 2 else positions, rotary)


def slower(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    with torch.no_grad():
        rotary.freq *= 1 - 1e-4
    return ours(q, k, positions, rotary)


def tables_in_half(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    return tuple(x.half().float() for x in ours(q, k, positions, rotary))


def keys_unturned(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    return ours(q, k, positions, rotary)[0], k


def other_shapes(rotary: FopeRotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
    return tuple(x.transpose(1, 2) for x in ours(q, k, positions, rotary))


WRONG = (swapped_heads, one_later, first_row, slower, tables_in_half, keys_unturned, other_shapes)


@pytest.mark.parametrize("forward", WRONG, ids=lambda forward: forward.__name__)
def test_every_mistake_of_an_adapter_is_refused(forward: Forward) -> None:
    with pytest.raises(ConfigError, match=r"block\.1: what replaces Explicit is not the same"):
        replace_rotary(around(Explicit()), Explicit, adapter(forward))


class Attention(nn.Module):
    """What takes tables, or a mask, cannot be called without its own model."""

    def forward(self, x: Tensor, cos: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return turned(q, torch.arange(x.shape[1])).transpose(1, 2).flatten(2) + 0 * cos.sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor, twice: Tensor | None = None) -> Tensor:
        cos = torch.ones(x.shape[1])
        x = self.first(x, cos=cos)
        return x if twice is None else self.second(x, cos)


def attention(rotary: FopeRotary, x: Tensor, cos: Tensor) -> Tensor:
    q = x.unflatten(-1, (HEADS, WIDTH))
    turned: Tensor = rotary(q, q, torch.arange(x.shape[1]).expand(len(x), -1))[0]
    return turned.flatten(2)


class Visual(nn.Module):
    """Qwen3-VL's rotation, by its own code, with as many pairs as a head has."""

    sections = (4, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        scaling = {"rope_type": "default", "mrope_section": [*self.sections]}
        config = Qwen3VLTextConfig(head_dim=WIDTH, hidden_size=HEADS * WIDTH, rope_theta=1e4, rope_scaling=scaling)
        self.angles = Qwen3VLTextRotaryEmbedding(config)

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, *self.angles(q, position_ids))
        return turned


def visual(axis: tuple[int, ...]) -> Callable[[nn.Module], nn.Module]:
    """Makes our own with such an axis."""
    plain = Spectrum.rope(frequencies.exponential(1e4, WIDTH).numpy(), WIDTH)
    config = msgspec.structs.replace(plain.config, axes=3, axis=axis)

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = FopeRotary.from_spectrum(replace(plain, config=config))

        def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> Any:
            q, k = self.rotary(q.transpose(1, 2), k.transpose(1, 2), position_ids)
            return q.transpose(1, 2), k.transpose(1, 2)

    return lambda part: Ours()


def test_several_axes_take_the_place_of_qwens() -> None:
    """With what transformers computes; swapped ones, one axis and sections in the place of turns are refused."""
    by_turns, count = frequencies.axis_by_turns(Visual.sections, WIDTH // 2), WIDTH // 2
    assert by_turns == (0, 1, 2, 0, 1, 2, 0, 0)
    assert replace_rotary(around(Visual()), Visual, visual(by_turns)) == 1
    sections = frequencies.axis_in_sections(Visual.sections)
    assert sections == (0, 0, 0, 0, 1, 1, 2, 2)
    swapped = tuple((0, 2, 1)[axis] for axis in by_turns)
    for wrong in (sections, swapped, (0,) * count):
        with pytest.raises(ConfigError, match="what replaces Visual is not the same"):
            replace_rotary(around(Visual()), Visual, visual(wrong))


X = torch.randn(2, 9, HEADS * WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inputs", [(X, X), {"x": X, "twice": X}], ids=["a tuple", "by name"])
def test_the_models_own_calls_compare_what_nothing_else_can(inputs: Any) -> None:
    with pytest.raises(ConfigError, match="first: Attention cannot be compared") as caught:
        replace_rotary(Model(), Attention, adapter(attention))
    assert "inputs" in caught.value.hint
    with pytest.raises(ConfigError, match="first: what replaces Attention is not the same"):
        replace_rotary(Model(), Attention, adapter(attention, sin_pad=0.5), inputs=inputs)
    model = Model().eval()
    before = model(X, X)
    assert replace_rotary(model, Attention, adapter(attention), inputs=inputs) == 2
    torch.testing.assert_close(model(X, X), before)


class Uncopied(Explicit):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Uncopied":
        raise RuntimeError("only leaves support the deepcopy protocol")


def test_what_cannot_be_copied_is_told() -> None:
    with pytest.raises(ConfigError, match="Uncopied cannot be copied, to be compared: only leaves"):
        replace_rotary(around(Uncopied()), Uncopied, adapter(explicit))


class Wrapping(Explicit):
    """Positions beyond a table's end begin anew."""

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, position_ids % 512)


def test_far_positions_are_compared_too() -> None:
    with pytest.raises(ConfigError, match="what replaces Wrapping is not the same"):
        replace_rotary(around(Wrapping()), Wrapping, adapter(explicit))


def test_inputs_that_do_not_reach_a_part_or_do_not_run_are_told() -> None:
    with pytest.raises(ConfigError, match="second: Attention cannot be compared"):
        replace_rotary(Model(), Attention, adapter(attention), inputs=(X,))
    with pytest.raises(ConfigError, match="Model does not run on the inputs"):
        replace_rotary(Model(), Attention, adapter(attention), inputs=(X, X, X))


def test_a_half_model_is_compared_in_float32() -> None:
    model = around(Explicit()).half()
    assert replace_rotary(model, Explicit, adapter(explicit)) == 1
    with pytest.raises(ConfigError, match="is not the same"):
        replace_rotary(around(Explicit()).half(), Explicit, adapter(tables_in_half))


def test_replacing_nothing_is_an_error() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match="no part of ModuleList is GELU") as caught:
        replace_rotary(model, nn.GELU, nn.Identity)
    assert "Linear" in caught.value.hint
    shared = nn.ReLU()
    sharing = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(2, 2)).eval()
    assert replace_rotary(sharing, lambda part: isinstance(part, nn.ReLU), lambda part: nn.Threshold(0, 0)) == 1
    first, second = sharing.get_submodule("0"), sharing.get_submodule("1.0")
    assert first is second and isinstance(first, nn.Threshold) and not first.training
