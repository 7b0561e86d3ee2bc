"""Optimization profiles: the range of every size that an engine is built for, and whether a request is in it."""

from collections.abc import Mapping

import msgspec

from fope_export.config import BuildConfig, Size, usual_length
from fope_export.errors import BackendError, ConfigError
from fope_export.manifest import Manifest, ModuleRecord, Port

PREFILL = 512
"""Tokens at once that the prefill profile is tuned for."""


class Range(msgspec.Struct, frozen=True, array_like=True):
    """The sizes from `min` to `max`, tuned for `opt`, as TensorRT calls them."""

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        if not self.min <= self.opt <= self.max:
            raise ConfigError(f"{[*msgspec.structs.astuple(self)]}, expected min, opt and max", hint="As 1,16,64.")


DECODER = "Its sizes follow from --max-batch and --max-length."
Profile = dict[str, Range]
"""By symbolic size: batch, sequence, past_sequence, total_sequence; of a module, by the names of its own."""
GROWTH = 4
"""How many times larger than in its example a module's size may be, where nobody says."""


def make_profiles(config: BuildConfig, manifest: Manifest) -> dict[str, Profile]:
    """The profiles to build an engine with, by name. For a decoder: `prefill`, for prompts or parts of them, and
    `decode`, for one token at a time; both take 1 to `max_batch` rows of at most `max_length` tokens, past and new
    together. For a module there is one, `module`: each of its sizes has the range that `config` gives, or one around
    the size of the example that it was exported with.

    Raises ConfigError where `max_length` is more than a static cache has room for, where `config` names a size that
    the graph does not have, and where a range goes beyond what was traced.
    """
    if isinstance(manifest.model, ModuleRecord):
        return {"module": _module_profile(config, manifest.model)}
    if config.sizes:
        raise ConfigError(f"a decoder has no size {next(iter(config.sizes))} to set", hint=DECODER)
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


def _module_profile(config: BuildConfig, record: ModuleRecord) -> Profile:
    if config.max_length or config.max_batch != BuildConfig().max_batch:
        raise ConfigError("a module has sizes of its own, and neither max_batch nor max_length", hint=_known(record))
    if unknown := sorted(config.sizes.keys() - record.sizes.keys()):
        raise ConfigError(f"the graph has no size {unknown[0]}", hint=_known(record))
    profile = {}
    for name, extent in record.sizes.items():
        largest = min(GROWTH * extent.example, extent.max or GROWTH * extent.example)
        profile[name] = size = Range(*config.sizes.get(name, (extent.min, extent.example, largest)))
        if size.min < extent.min or (extent.max is not None and size.max > extent.max):
            raise ConfigError(
                f"{name} was traced from {extent.min} to {extent.max or 'any size'}, and the engine wants "
                f"{size.min} to {size.max}",
                hint="Export again with another Dim(name, min=…, max=…), or ask for less.",
            )
    return profile


def _known(record: ModuleRecord) -> str:
    example = "; ".join(f"--size {name}={e.min},{e.example},{2 * e.example}" for name, e in record.sizes.items())
    return f"For example {example}." if example else "All its sizes are fixed."


def shapes(profile: Profile, port: Port) -> list[tuple[int, ...]]:
    """The shapes that `profile` gives the input `port`: the smallest, the one to tune for, and the largest."""
    ends = ("min", "opt", "max")
    return [port.at({name: getattr(size, end) for name, size in profile.items()}) for end in ends]


def fitting(profiles: Mapping[str, Profile], sizes: Mapping[str, int]) -> str:
    """The name of the profile to run a request in, whose `sizes` are by symbolic name: of those that hold them all, the
    one that is made for the fewest tokens at once.

    Raises BackendError where none does, with what is too small or too large for each.
    """
    outside = {name: _outside(profile, sizes) for name, profile in profiles.items()}
    for name in sorted(outside, key=lambda name: profiles[name]["sequence"].max):
        if not outside[name]:
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in outside.items())
    raise BackendError(
        f"the request does not fit the engine's profiles: {told}",
        hint="Ask for less, or build the engine with a larger --max-batch or --max-length.",
    )


def _outside(profile: Profile, sizes: Mapping[str, int]) -> str:
    return ", ".join(
        f"{name} is {size}, expected {profile[name].min} to {profile[name].max}"
        for name, size in sizes.items()
        if not profile[name].min <= size <= profile[name].max
    )
