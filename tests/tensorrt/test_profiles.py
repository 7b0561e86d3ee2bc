import pytest

from fope_export.bundle import Bundle
from fope_export.config import BuildConfig
from fope_export.errors import BackendError, ConfigError
from fope_export.tensorrt.profiles import Profile, Range, fitting, make_profiles, shapes


@pytest.fixture
def profiles(bundle: Bundle) -> dict[str, Profile]:
    return make_profiles(BuildConfig(max_batch=2, max_length=100), bundle.manifest)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"batch": 1, "sequence": 1, "past_sequence": 0, "total_sequence": 1}, "decode"),
        ({"batch": 2, "sequence": 1, "past_sequence": 99, "total_sequence": 100}, "decode"),
        ({"batch": 2, "sequence": 100, "past_sequence": 0, "total_sequence": 100}, "prefill"),
        ({"batch": 1, "sequence": 7, "past_sequence": 20, "total_sequence": 27}, "prefill"),
    ],
)
def test_the_narrowest_profile_serves(profiles: dict[str, Profile], sizes: dict[str, int], name: str) -> None:
    assert fitting(profiles, sizes) == name


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 3, "sequence": 1}, "decode: batch is 3, expected 1 to 2"),
        ({"batch": 1, "sequence": 101}, "prefill: sequence is 101, expected 1 to 100"),
        ({"batch": 1, "sequence": 1, "past_sequence": 100}, "past_sequence is 100, expected 0 to 99"),
    ],
)
def test_a_request_outside_is_told_what_is_outside(
    profiles: dict[str, Profile], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        fitting(profiles, sizes)
    assert "--max-length" in caught.value.hint


def test_shapes_of_the_inputs_follow(bundle: Bundle, profiles: dict[str, Profile]) -> None:
    ports = {port.name: port for port in bundle.manifest.inputs}
    assert shapes(profiles["prefill"], ports["input_ids"]) == [(1, 1), (1, 100), (2, 100)]
    assert shapes(profiles["decode"], ports["past_key_values.0.key"])[0][2] == 0
    for profile in profiles.values():
        assert all(isinstance(size, Range) and size.min <= size.opt <= size.max for size in profile.values())


def test_the_usual_length_is_16_times_the_training_length(bundle: Bundle) -> None:
    made = make_profiles(BuildConfig(), bundle.manifest)
    assert made["prefill"]["total_sequence"].max == 16 * bundle.manifest.decoder().training_length


def test_a_static_cache_bounds_the_length(static_bundle: Bundle) -> None:
    capacity = static_bundle.manifest.export.capacity
    assert capacity
    assert make_profiles(BuildConfig(), static_bundle.manifest)["decode"]["total_sequence"].max == capacity
    with pytest.raises(ConfigError, match=f"room for {capacity}"):
        make_profiles(BuildConfig(max_length=capacity + 1), static_bundle.manifest)
