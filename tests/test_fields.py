"""Every rendering of the rotation follows every field of a spectrum, and one that forgets a field is noticed."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import Settings, load_backend
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig, SpectrumConfig
from fope_export.errors import ConfigError
from fope_export.fope import contract, reference
from fope_export.fope.folding import folding_of
from fope_export.fope.rotary import FopeRotary, rotary, rotated
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.checkpoint import load_checkpoint
from fope_export.parity.localize import different_rotations
from fope_export.tensorrt.compile import SOURCES
from tests.fields import EXTENSIONS, OTHERS, Changes, Render, Results, changed, forgetting, held
from tests.fope.rotations import make
from tests.graph.one_call import model_of_one_call, run

SHAPE = (4, 2, 2, 16, 5, 4)
SPECTRUM, *INPUTS = make(SHAPE, axes=3, axis=(0, 1, 2, 0, 1), bases=2)
PLAIN = changed(SPECTRUM, {"axes": 1, "axis": (), "bases": 1})
Q, K, POSITIONS = INPUTS[0].half(), INPUTS[1].half(), INPUTS[2]
FIELDS = [*contract.SETTINGS, *EXTENSIONS]


def plainly(render: Render) -> Render:
    """The same of the spectrum without extensions, at one position of each token."""

    def rendered(changes: Changes) -> Results:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "SPECTRUM", PLAIN)
            patch.setitem(globals(), "POSITIONS", POSITIONS[0])
            return render(changes)

    return rendered


def definition(changes: Changes) -> Results:
    return [reference.rotate(changed(SPECTRUM, changes), x.numpy(), POSITIONS.numpy()) for x in (Q, K)]


def in_torch(changes: Changes) -> Results:
    return [x.numpy() for x in FopeRotary.from_spectrum(changed(SPECTRUM, changes))(Q, K, POSITIONS)]


def in_onnx(changes: Changes) -> Results:
    model = model_of_one_call(changed(SPECTRUM, changes), Q.shape[2], K.shape[2], np.float16)
    return run(model, Q.numpy(), K.numpy(), POSITIONS.numpy())


def gradients(changes: Changes, operator: Callable[..., Any] = rotary, dtype: torch.dtype = torch.float16) -> Results:
    """Of queries and coefficients, for results that count as their numbers."""
    module = FopeRotary.from_spectrum(changed(SPECTRUM, changes), learnable=True)
    module.operator = operator
    q = Q.detach().to(dtype).requires_grad_()
    for x in module(q, K.to(dtype), POSITIONS):
        (x * x.detach().roll(1)).sum().backward(retain_graph=True)
    return [gradient(x) for x in (q, module.sin_coef, module.cos_coef)]


def gradient(x: torch.Tensor) -> np.ndarray:
    assert x.grad is not None
    return x.grad.numpy()


def scores(q: np.ndarray, k: np.ndarray) -> Results:
    return [np.einsum("bshe,bthe->bhst", q, np.repeat(k, q.shape[2] // k.shape[2], axis=2))]


def folded(changes: Changes) -> Results:
    """Scores of queries and keys that are turned by what folding leaves of the rotation."""
    folding = folding_of(changed(SPECTRUM, changes).config)
    left = replace(changed(SPECTRUM, changes), config=folding.config)
    q, k = ((x.double()[..., folding.channels] * folding.scale).numpy() for x in (Q, K))
    return scores(*(reference.rotate(left, x, POSITIONS.numpy()) for x in (q, k)))


RENDERINGS: dict[str, tuple[Render, Render]] = {
    "torch": (in_torch, definition),
    "torch's gradients": (gradients, lambda changes: gradients(changes, rotated, torch.float64)),
    "ONNX function": (in_onnx, definition),
    "folding": (folded, lambda changes: scores(*definition(changes))),
}
"""Each with what it is held to."""
NOT_READ = {
    ("folding", "rotary_dim"): "only rotations of whole heads are folded",
    ("folding", "full_precision"): "it moves channels and scales them, and rotates nothing",
}


@pytest.mark.parametrize("setting", contract.SETTINGS)
@pytest.mark.parametrize("name", RENDERINGS)
def test_a_rendering_of_a_plain_spectrum_follows_every_field(name: str, setting: str) -> None:
    _follows(name, setting, *map(plainly, RENDERINGS[name]))


@pytest.mark.parametrize("setting", FIELDS)
@pytest.mark.parametrize("name", RENDERINGS)
def test_a_rendering_follows_every_field(name: str, setting: str) -> None:
    _follows(name, setting, *RENDERINGS[name])


def _follows(name: str, setting: str, render: Render, truth: Render) -> None:
    if (name, setting) in NOT_READ:
        with pytest.raises((AssertionError, ConfigError)):
            held(setting, render, truth)
        return
    held(setting, render, truth)
    with pytest.raises(AssertionError, match=setting):
        held(setting, forgetting(setting, render), truth)


@pytest.mark.parametrize("setting", sorted({*FIELDS} - {"full_precision"}))  # the definition is float64
def test_the_definition_reads_every_field(setting: str) -> None:
    held(setting, definition, definition)
    forgetful = forgetting(setting, definition)
    with pytest.raises(AssertionError, match=setting):
        held(setting, forgetful, forgetful)


@pytest.fixture(scope="module")
def half(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(native, tmp_path_factory.mktemp("half") / "out", ExportConfig(dtype="fp16"))


@pytest.mark.parametrize("setting", contract.SETTINGS)
def test_the_optimized_graph_follows_every_field(setting: str, half: Bundle, tmp_path: Path) -> None:
    def logits(changes: Changes, *, optimized: bool) -> Results:
        folder = tmp_path / f"{len([*tmp_path.iterdir()])}"
        bundle = Bundle.open(shutil.copytree(half.path, folder))
        say(bundle, changes)
        backend = load_backend(optimize(bundle) if optimized else bundle, settings=Settings(optimized=optimized))
        feeds = feeds_for(np.arange(1, 41)[None])
        return [backend.step(feeds, backend.empty_cache(1))[0]]

    def render(changes: Changes) -> Results:
        return logits(changes, optimized=True)

    def truth(changes: Changes) -> Results:
        return logits(changes, optimized=False)

    held(setting, render, truth)
    with pytest.raises(AssertionError, match=setting):
        held(setting, forgetting(setting, render), truth)


def say(bundle: Bundle, changes: Changes) -> None:
    """Have the portable graph's calls carry what a changed spectrum would."""
    config = bundle.manifest.decoder()
    spectrum = msgspec.structs.replace(config.spectrum, **changes)
    told = contract.attributes(
        contract.settings(spectrum), dtype=onnx.TensorProto.FLOAT16, head_dim=spectrum.head_dim,
        heads=config.num_heads, kv_heads=config.num_kv_heads, groups=spectrum.groups,
    )  # fmt: skip
    model = onnx.load(bundle.model, load_external_data=False)
    for node in model.graph.node:
        if node.domain == contract.DOMAIN:
            del node.attribute[:]
            every = {**told, **contract.DISPATCH[len(node.input) - len(contract.INPUTS[contract.PLAIN]) + 1]}
            node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in every.items())
    onnx.save(model, bundle.model)


@pytest.mark.parametrize("setting", contract.SETTINGS)
def test_localization_compares_every_field(
    setting: str, half: Bundle, native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(native).model
    assert different_rotations(half, model) == []
    second = model.attentions()[1].rotary
    second.config = msgspec.structs.replace(second.config, **{contract.SETTINGS[setting].field: OTHERS[setting]})
    assert different_rotations(half, model) == ["layers.1.attention.rotary"]
    known, whole = contract.settings(model.config.spectrum), contract.settings
    monkeypatch.setattr(contract, "settings", lambda config: whole(config) | {setting: known[setting]})
    assert different_rotations(half, model) == []


def configuration(settings: dict[str, contract.Setting]) -> set[str]:
    return {setting.field for setting in settings.values()} | contract.SIZES.keys() | {contract.AXIS.name}


def test_a_spectrums_configuration_has_the_contracts_fields_and_no_others() -> None:
    fields = set(SpectrumConfig.__struct_fields__)
    assert fields == configuration(contract.SETTINGS)
    for name in contract.SETTINGS:
        rest = {other: setting for other, setting in contract.SETTINGS.items() if other != name}
        assert fields != configuration(rest)
    assert OTHERS.keys() == contract.SETTINGS.keys()
    assert EXTENSIONS.keys() == {contract.AXIS.name, "bases"}  # axes count what axis names


def plugin_fields(source: str) -> list[str]:
    """What the TensorRT plugin reads from its node."""
    _, _, table = source.partition("kFields[] = {")
    return re.findall(r'^ +\{"(\w+)", ', table.partition("};")[0], re.MULTILINE)


def test_the_plugin_reads_every_attribute() -> None:
    source = (SOURCES / "plugin.cpp").read_text()
    assert plugin_fields(source) == [*contract.ATTRIBUTES]
    for name in contract.ATTRIBUTES:
        assert plugin_fields(source.replace(f'{{"{name}", ', "{")) != [*contract.ATTRIBUTES]


def kernel_fields(header: str) -> set[str]:
    """What the kernel is told beside its tensors."""
    _, _, struct = header.partition("struct FopeRotaryArguments {")
    return set(re.findall(r"^ +(?:float|int32_t) (\w+);", struct.partition("};")[0], re.MULTILINE))


def test_the_kernel_is_told_every_setting() -> None:
    """But the precision: it rotates in float32 always."""
    header, wanted = (SOURCES / "arguments.h").read_text(), contract.SETTINGS.keys() - {"full_precision"}
    assert wanted <= kernel_fields(header)
    for name in wanted:
        assert not wanted <= kernel_fields(header.replace(f" {name};", " other;"))
