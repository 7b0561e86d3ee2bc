"""Configurations are closed, frozen and checked whichever way they are made."""

import msgspec
import pytest

from fope_export.config import BuildConfig, ExportConfig, ModelConfig, SpectrumConfig, convert
from fope_export.errors import ConfigError
from fope_export.model.layouts.olmo import OlmoFlags
from tests.conftest import small_decoder

GOOD = small_decoder().config


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": -4}, {"groups": 0}, {"sign": 7}, {"pairing": "diagonal"}, {"sin_pad": float("nan")},
        {"cos_pad": float("inf")}, {"full_precision": 1}, {"frequencies": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_spectrum_is_checked_at_birth(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
        SpectrumConfig(**(msgspec.to_builtins(GOOD.spectrum) | fields))
    assert caught.value.hint


@pytest.mark.parametrize(
    "fields", [{"num_heads": 0}, {"norm_eps": 0.0}, {"num_kv_heads": 3}, {"eos_token_id": 256}], ids=str
)
def test_a_model_is_checked_at_birth(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        msgspec.structs.replace(GOOD, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": "static", "opset": 23}, "needs opset 24"),
        ({"extend_to": 100}, "says how far, and not how"),
        ({"capacity": 100}, "a dynamic cache has no capacity"),
        ({"dtype": "fp8"}, "dtype: Invalid enum value"),
    ],
)
def test_an_export_is_checked_at_birth(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig(**fields)


@pytest.mark.parametrize(("trained", "room"), [(64, 1024), (512, 8192), (1024, 8192), (20_000, 20_000)])
def test_an_export_has_nothing_open_once_the_model_is_known(trained: int, room: int) -> None:
    assert ExportConfig().resolved(trained) == ExportConfig(opset=23)
    assert ExportConfig(cache="static").resolved(trained) == ExportConfig(cache="static", opset=24, capacity=room)


@pytest.mark.parametrize(
    "target", ["tensorrt:sm86", "tensorrt-rtx:", "tensorrt-rtx:86", "cuda", "tensorrt-rtx:sm86/../x"]
)
def test_targets_are_closed(target: str) -> None:
    with pytest.raises(ConfigError, match="expected tensorrt, tensorrt-rtx or"):
        BuildConfig(target=target)


def test_a_target_names_a_library_and_gpus() -> None:
    assert BuildConfig(target="tensorrt").architectures == ()
    assert BuildConfig().architectures == ("sm86", "sm89", "sm120")
    named = BuildConfig(target="tensorrt-rtx:sm89")
    assert (named.library, named.architectures) == ("tensorrt-rtx", ("sm89",))


def test_they_are_frozen_and_come_back_from_json() -> None:
    with pytest.raises(AttributeError):
        GOOD.num_heads = 3
    assert msgspec.json.decode(msgspec.json.encode(GOOD), type=ModelConfig) == GOOD


def test_unknown_fields_are_errors_with_the_likely_name() -> None:
    with pytest.raises(ConfigError, match=r"here: .*`fourrier`") as caught:
        convert({"fourrier": True}, OlmoFlags, where="here")
    assert caught.value.hint.startswith("Did you mean fourier?")


def test_numbers_as_text_are_read_where_yaml_makes_them() -> None:
    assert convert({"layer_norm_eps": "1e-6"}, OlmoFlags, where="here", strict=False).layer_norm_eps == 1e-6
    with pytest.raises(ConfigError, match="opset"):
        convert({"opset": 17}, ExportConfig, where="here")
