"""One model in memory at a time changes no bit: of the truth, of the members, of what they are judged by."""

import copy
import gc
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime
import pytest
import torch

from fope_export.backends.base import Feeds
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.config import ExpertsConfig, ExportConfig
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.checkpoint import source_of
from fope_export.model.decoder import Decoder
from fope_export.model.experts import Experts
from fope_export.parity import sparing
from fope_export.parity.cases import Case, prefill, standard_cases
from fope_export.parity.disk import kept, moved_to_disk
from fope_export.parity.judge import MEMBERS, Noise
from fope_export.parity.quantized import place_weights
from fope_export.parity.run import validate
from fope_export.parity.sparing import SparingYardstick
from fope_export.parity.yardstick import Look, Yardstick, moved
from tests.conftest import small_decoder

EXPERTS = ExpertsConfig(count=4, per_token=2, intermediate_size=24, layers=(1,), groups=1, normalize=True)


def static(model: Decoder) -> Decoder:
    model.capacity = 200
    return model


def with_experts(model: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, Experts):
            for weight in (module.proj, module.out):
                weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    return model


MODELS: dict[str, Callable[[], Decoder]] = {
    "plain": small_decoder,
    "tied, grouped": lambda: small_decoder(tie_embeddings=True, kv_heads=2),
    "biases, norms of queries": lambda: small_decoder(qkv_bias=True, out_bias=True, qk_norm=True),
    "experts": lambda: with_experts(small_decoder(experts=EXPERTS)),
    "half": lambda: small_decoder().half(),
    "bfloat16": lambda: small_decoder().bfloat16(),
    "static cache": lambda: static(small_decoder()),
}


def cases(model: Decoder) -> list[Case]:
    """A prefill, a padded batch and a decode."""
    standard = standard_cases(model.config, lengths=(7,))
    return [standard[0], standard[3], standard[4]]


@pytest.mark.parametrize("name", MODELS)
def test_the_truth_is_that_of_a_model_in_float64_bit_for_bit(name: str) -> None:
    model = MODELS[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    double, wanted = EagerBackend.in_float64(model), EagerBackend(copy.deepcopy(model).double())
    for case in cases(model):
        assert np.array_equal(case.run(double), case.run(wanted))
        assert case.prefilled(double).dtype == np.float64
    for key, tensor in double.model.state_dict().items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key])
        assert tensor.data_ptr() == model.state_dict()[key].data_ptr()


def test_weights_come_back_when_a_step_fails() -> None:
    model = small_decoder()
    double = EagerBackend.in_float64(model)
    feeds = prefill(model.config, 7, 0).feeds
    with pytest.raises(IndexError):
        double.step(Feeds(feeds.input_ids + 256, *feeds[1:]), double.empty_cache(len(feeds.input_ids)))
    double.model.lm_head.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    with pytest.raises(RuntimeError):
        double.step(feeds, double.empty_cache(len(feeds.input_ids)))
    assert {parameter.dtype for parameter in double.model.parameters()} == {torch.float32}


def test_the_truth_has_all_digits_of_a_quantized_weight(native: Path, tmp_path: Path) -> None:
    bundle = export(native, tmp_path / "int4", ExportConfig(quantize="int4"))
    model = source_of(bundle).model
    double, wanted = EagerBackend.in_float64(model), EagerBackend(copy.deepcopy(model).double())
    place_weights(bundle, double.model, "float32", moved_to_disk)
    place_weights(bundle, wanted.model, "float32")
    weight = double.model.lm_head.weight
    assert weight.dtype == torch.float64 and torch.equal(weight, wanted.model.lm_head.weight)
    assert not torch.equal(weight, weight.float().double())
    case = prefill(model.config, 7, 0)
    assert np.array_equal(case.run(double), case.run(wanted))


@pytest.mark.parametrize("piece", [1, 100, 1 << 22])
@pytest.mark.parametrize("name", ["tied, grouped", "experts", "half", "bfloat16"])
def test_a_member_is_moved_as_a_whole_copy_is(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparing, "PIECE", piece)
    model = MODELS[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    member = yardstick_of(SparingYardstick, model).member(5).model
    for key, tensor in moved(model, 5).state_dict().items():
        assert torch.equal(member.state_dict()[key], tensor)
        assert torch.equal(model.state_dict()[key], before[key])
    assert (member.lm_head.weight is member.embed.weight) == model.config.tie_embeddings


Kind = TypeVar("Kind", bound=Yardstick)


def yardstick_of(kind: type[Kind], model: Decoder) -> Kind:
    return kind(EagerBackend(model), EagerBackend.in_float64(model))


def numbers(look: Look, noise: Noise) -> list[object]:
    """All that is judged by."""
    return [np.asarray(value).tolist() for value in (look.truth, *vars(noise).values())] + [look.own]


@pytest.mark.parametrize("together", [1, 1 << 33], ids=["one by one", "all together"])
def test_looks_are_the_same_whatever_lies_on_the_disk(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparing, "AT_ONCE", together)
    model = small_decoder()
    looked = cases(model)
    told: list[str] = []
    looks = yardstick_of(SparingYardstick, model).looks(looked, told.append)
    simple = yardstick_of(Yardstick, model)
    wanted = [simple.look(case) for case in looked]
    assert [numbers(look, look.noise) for look in looks] == [numbers(look, look.noise) for look in wanted]
    assert numbers(looks[1], looks[1].again()) == numbers(wanted[1], wanted[1].again())
    assert len(told) == (1 + MEMBERS) * len(looked)


def test_a_validation_judges_as_the_simple_way_does(bundle: Bundle) -> None:
    model = source_of(bundle).model
    simple = Yardstick(EagerBackend(model), EagerBackend(copy.deepcopy(model).double()))
    result, tested = validate(bundle, backend="onnxruntime", lengths=(7,)), load_backend(bundle)
    wanted = [simple.look(case).judge(case.run(tested)) for case in standard_cases(model.config, lengths=(7,))]
    assert [each.verdict for each in result.cases] == wanted


@pytest.mark.whole
def test_no_model_outlives_its_turn(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, member = optimize(export(native, tmp_path / "out")), SparingYardstick.member
    made: list[weakref.ref[EagerBackend]] = []

    def sessions() -> int:
        return sum(type(each) is onnxruntime.InferenceSession for each in gc.get_objects())

    def watched(self: SparingYardstick, number: int) -> EagerBackend:
        assert sessions() == before and not any(former() for former in made)
        made.append(weakref.ref(one := member(self, number)))
        return one

    monkeypatch.setattr(SparingYardstick, "member", watched)
    before = sessions()
    assert validate(bundle, backend="onnxruntime", lengths=(7,)).passed
    assert len(made) == MEMBERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_on_the_disk_has_no_name_there(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = torch.randn(3, 5).to(dtype)
    assert torch.equal(moved_to_disk(tensor), tensor)
    assert not [*tmp_path.iterdir()]
    array = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    assert np.array_equal(kept(array), array) and kept(array).dtype == np.float32
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError):
        kept(array)
