"""The first module that diverges: right where a fault is planted, however small, and silent where there is none."""

import copy
from collections.abc import Callable

import msgspec
import pytest
from torch import nn

from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.model.checkpoint import source_of
from fope_export.model.decoder import Decoder
from fope_export.parity import judge as judging
from fope_export.parity.cases import prefill
from fope_export.parity.judge import CLEAR, judge_columns
from fope_export.parity.localize import first_divergence
from fope_export.parity.run import validate, yardstick_of
from fope_export.parity.yardstick import Yardstick
from fope_export.report import place


def epsilon(model: Decoder, size: float) -> None:
    norm = model.get_submodule("layers.1.ff_norm")
    assert isinstance(norm, nn.RMSNorm) and norm.eps is not None
    norm.eps += 1e-3 * size


def one_head(model: Decoder, size: float) -> None:
    for coef in (model.attentions()[1].rotary.sin_coef, model.attentions()[1].rotary.cos_coef):
        coef[0] *= 1 + size


def padding(model: Decoder, size: float) -> None:
    rotary = model.attentions()[1].rotary
    rotary.config = msgspec.structs.replace(rotary.config, sin_pad=1 + size)


def feed_forward(model: Decoder, size: float) -> None:
    weight = model.get_parameter("layers.0.feed_forward.ff_out.weight")
    weight[3] += size * weight.square().mean().sqrt()


def head_row(model: Decoder, size: float) -> None:
    model.lm_head.weight[3] += size * model.lm_head.weight.square().mean().sqrt()


FAULTS: dict[str, tuple[Callable[[Decoder, float], None], str]] = {
    "epsilon of a norm": (epsilon, "layers.1.ff_norm"),
    "coefficients of a head": (one_head, "layers.1.attention.rotary"),
    "padding": (padding, "layers.1.attention.rotary"),
    "row of a projection": (feed_forward, "layers.0.feed_forward.ff_out"),
    "row of the last layer": (head_row, "lm_head"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_or_none_is(name: str, bundle: Bundle) -> None:
    """The fault is in PyTorch, and the bundle is as wrong beside it: ever smaller, until the rule passes it."""
    plant, module = FAULTS[name]
    source = source_of(bundle).model
    case = prefill(source.config, 64, 9)
    refused, named = [], []
    for size in (1.0, 1e-2, 1e-4, 1e-6, 1e-8):
        wrong = copy.deepcopy(source)
        plant(wrong, size)
        yardstick = Yardstick(EagerBackend(wrong), EagerBackend.in_float64(wrong))
        verdict = yardstick.look(case).judge(case.run(load_backend(bundle)))
        divergence = first_divergence(bundle, yardstick, case.feeds)
        refused.append(not verdict.passed or not judge_columns([verdict]).passed)
        named.append(divergence.module if divergence else "")
    assert refused[0] and not refused[-1]
    assert refused == sorted(refused, reverse=True)
    assert named[0] == module and set(named) <= {module, ""} and named[-1] == ""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [1, 7, 64])
def test_no_module_of_a_right_bundle_is_named(length: int, seed: int, bundle: Bundle) -> None:
    model = source_of(bundle).model
    yardstick = yardstick_of(bundle, model.converted(bundle.manifest.export), "onnxruntime")
    assert first_divergence(bundle, yardstick, prefill(model.config, length, seed).feeds) is None


@pytest.mark.parametrize("ratio", ["rms", "column"])
def test_a_rule_that_is_only_just_missed_names_no_layer(
    ratio: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(judging.LIMITS, ratio, 0.5 / CLEAR)  # clear enough for eight members
    result = validate(bundle, lengths=(7,))
    assert not result.passed and result.place is not None and result.place.divergence is None
    assert place(result).endswith("no layer can be named.")
