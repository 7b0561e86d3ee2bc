"""Optimization profiles: the range of every size that an engine is built for, and whether a request is in it."""

from collections.abc import Mapping

import msgspec

from fope_export.bundle import Manifest, Port
from fope_export.config import BuildConfig, usual_length
from fope_export.errors import BackendError, ConfigError

PREFILL = 512
"""Tokens at once that the prefill profile is tuned for."""


class Range(msgspec.Struct, frozen=True, array_like=True):
    """The sizes from `least` to `most`, tuned for `best`."""

    least: int
    best: int
    most: int


Profile = dict[str, Range]
"""By symbolic size: batch, sequence, past_sequence, total_sequence."""


def make_profiles(config: BuildConfig, manifest: Manifest) -> dict[str, Profile]:
    """A profile for prompts (or parts of them) and one for single tokens, both to `max_length` tokens in total.

    Raises ConfigError where a static cache has less room.
    """
    capacity = manifest.export.capacity
    length = config.max_length or capacity or usual_length(manifest.model.training_length)
    if capacity and length > capacity:
        raise ConfigError(
            f"max_length is {length}, and the bundle's static cache has room for {capacity}",
            hint="Ask for less, or export with a larger --capacity.",
        )
    batch, chunk, half = Range(1, 1, config.max_batch), min(PREFILL, length), max(length // 2, 1)
    return {
        "prefill": {
            "batch": batch,
            "sequence": Range(1, chunk, length),
            "past_sequence": Range(0, 0, length - 1),
            "total_sequence": Range(1, chunk, length),
        },
        "decode": {
            "batch": batch,
            "sequence": Range(1, 1, 1),
            "past_sequence": Range(0, half - 1, length - 1),
            "total_sequence": Range(1, half, length),
        },
    }


def shapes(profile: Profile, port: Port) -> list[tuple[int, ...]]:
    """Least, best and largest shape of an input."""
    ranges = [Range(size, size, size) if isinstance(size, int) else profile[size] for size in port.shape]
    return [tuple(getattr(size, end) for size in ranges) for end in ("least", "best", "most")]


def fitting(profiles: Mapping[str, Profile], sizes: Mapping[str, int]) -> str:
    """The name of the narrowest profile that holds a request's `sizes`.

    Raises BackendError with what lies outside of each.
    """
    outside = {name: _outside(profile, sizes) for name, profile in profiles.items()}
    for name in sorted(outside, key=lambda name: profiles[name]["sequence"].most):
        if not outside[name]:
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in outside.items())
    raise BackendError(
        f"the request does not fit the engine's profiles: {told}",
        hint="Ask for less, or build the engine with a larger --max-batch or --max-length.",
    )


def _outside(profile: Profile, sizes: Mapping[str, int]) -> str:
    return ", ".join(
        f"{name} is {size}, expected {profile[name].least} to {profile[name].most}"
        for name, size in sizes.items()
        if not profile[name].least <= size <= profile[name].most
    )
