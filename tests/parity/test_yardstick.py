"""Members differ from the model by its last places alone, and give the same rows of logits as the steps do."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fope_export.backends.base import Feeds, Limits, Logits, feeds_for
from fope_export.backends.choose import BACKENDS
from fope_export.backends.eager import EagerBackend
from fope_export.config import ExportConfig
from fope_export.generation import pad_left
from fope_export.model.decoder import Cache
from fope_export.parity import cases as casing
from fope_export.parity import yardstick as yardsticks
from fope_export.parity.cases import Case, prefill, standard_cases
from fope_export.parity.judge import MEMBERS, MORE
from fope_export.parity.yardstick import Yardstick, moved, neighbours
from tests.conftest import small_decoder

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_weight_in_eight_becomes_its_neighbour(dtype: torch.dtype) -> None:
    tensor = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    near = neighbours(tensor, torch.Generator().manual_seed(1))
    up, down = (torch.nextafter(tensor, torch.full_like(tensor, end)) for end in (torch.inf, -torch.inf))
    shares = [float((near == value).double().mean()) for value in (tensor, up, down)]
    # Within six standard deviations of a count.
    assert shares == pytest.approx([7 / 8, 1 / 16, 1 / 16], abs=6 * (7 / 64 / tensor.numel()) ** 0.5)
    assert bool(((near == tensor) | (near == up) | (near == down)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_and_the_largest_numbers_stay_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    ends = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny], dtype=dtype).repeat(1000, 1)
    near = neighbours(ends, torch.Generator().manual_seed(0))
    assert bool(near.isfinite().all()) and bool((near[:, :2] == 0).all())
    assert all(len(column.unique()) > 1 for column in near[:, 2:].T)


def test_integers_stay() -> None:
    tensor = torch.arange(1000)
    assert neighbours(tensor, torch.Generator()) is tensor


def test_a_member_is_a_copy_with_the_same_angles_and_ties() -> None:
    model = small_decoder(tie_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    member, again, other = (moved(model, seed) for seed in (5, 5, 6))
    assert member.lm_head.weight is member.embed.weight
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(member.state_dict()[name], again.state_dict()[name])
        differs = not torch.equal(member.state_dict()[name], tensor)
        assert differs != name.endswith(".freq"), name
    assert not torch.equal(member.embed.weight, other.embed.weight)


def test_members_are_kept_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_decoder()
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(yardsticks, "HELD", 2 * size)
    yardstick = Yardstick(EagerBackend(model), EagerBackend.in_float64(model))
    kept = [yardstick.member(number) is yardstick.member(number) for number in range(4)]
    assert kept == [True, True, False, False]
    assert torch.equal(yardstick.member(3).model.embed.weight, yardstick.member(3).model.embed.weight)


def test_a_look_runs_its_members_once_and_more_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_decoder()
    yardstick = Yardstick(EagerBackend(model), EagerBackend.in_float64(model))
    run: list[int] = []
    member = Yardstick.member

    def counted(self: Yardstick, number: int) -> EagerBackend:
        run.append(number)
        return member(self, number)

    monkeypatch.setattr(Yardstick, "member", counted)
    look = yardstick.look(prefill(model.config, 7, 0))
    assert run == [*range(MEMBERS)] and look.noise.members == MEMBERS
    assert look.again() is look.again() and look.again().members == MEMBERS + MORE
    assert run == [*range(MEMBERS + MORE)]


class Watched(EagerBackend):
    """PyTorch in float64, and the feeds of its steps."""

    def __init__(self) -> None:
        super().__init__(small_decoder().double())
        self.fed: list[Feeds] = []

    def step(self, feeds: Feeds, cache: Cache, *, last: bool = False) -> tuple[Logits, Cache]:
        self.fed.append(feeds)
        return super().step(feeds, cache, last=last)


def same(got: np.ndarray, wanted: np.ndarray) -> bool:
    """In float64 two orders of summation differ by far less than a row from another one."""
    return got.shape == wanted.shape and bool(np.abs(got - wanted).max() < 1e-6 * np.abs(wanted).max())


def padded(*counts: int) -> Case:
    rng = np.random.default_rng(0)
    feeds = feeds_for(*pad_left([[int(i) for i in rng.integers(0, 256, count)] for count in counts]))
    longest = max(counts)
    return Case("padded", feeds, (longest - 2, 1, 1), longest - 3)


CASES = {
    "padded, two of a length": padded(5, 9, 5, 20),
    "rows": prefill(small_decoder().config, 7, 0),
    **{case.name: case for case in standard_cases(small_decoder().config)[-5:]},
}


@pytest.mark.parametrize("name", CASES)
def test_a_prefill_gives_the_rows_that_the_steps_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, stepped, whole, chunked = CASES[name], Watched(), Watched(), Watched()
    wanted = case.run(stepped)
    assert same(case.prefilled(whole), wanted)
    assert len(whole.fed) == len(np.unique(case.feeds.attention_mask.sum(axis=1)))
    assert all(feeds.attention_mask.all() for feeds in whole.fed)
    monkeypatch.setattr(casing, "STEP_BYTES", 1)
    assert same(case.prefilled(chunked), wanted)
    assert all(feeds.input_ids.shape[1] <= 64 for feeds in chunked.fed)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("number", [0, 1, 8, 10], ids=["1 token", "7 tokens", "decode", "padded"])
def test_a_backend_is_fed_as_many_rows_as_it_has_room_for(number: int, most: int) -> None:
    limited = standard_cases(small_decoder().config, limits=Limits(batch=most))[number]
    free, few, all_rows = standard_cases(small_decoder().config)[number], Watched(), Watched()
    assert same(limited.run(few), free.run(all_rows))
    assert max(len(feeds.input_ids) for feeds in few.fed) == min(most, len(free.feeds.input_ids))


@pytest.mark.parametrize(
    ("backend", "dtype", "arithmetic"),
    [
        ("onnxruntime", "fp32", "float32"), ("onnxruntime", "fp16", "float16"), ("onnxruntime", "bf16", "float32"),
        ("tensorrt", "bf16", "bfloat16"), ("onnxruntime-cuda", "fp16", "float16"),
    ],
)  # fmt: skip
def test_a_backend_says_in_what_it_computes(backend: str, dtype: str, arithmetic: str) -> None:
    exported: Any = SimpleNamespace(manifest=SimpleNamespace(export=ExportConfig(dtype=dtype)))
    assert BACKENDS[backend].arithmetic(exported) == arithmetic
