"""What lies in a bundle's folder `engines`: plans, and a record beside each."""

import msgspec

from fope_export.bundle import Bundle, sha256
from fope_export.config import BuildConfig
from fope_export.documents import check_file, read_record
from fope_export.errors import BackendError, ConfigError, DocumentError, cut
from fope_export.manifest import MODEL
from fope_export.tensorrt.profiles import Profile

FOLDER = "engines"
BUILD_IT = "Build one with `fope-export build`."


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `engines/<target>.json` says about the plan beside it."""

    target: str
    library: str
    library_version: str
    architectures: tuple[str, ...]  # none: the GPU it was built on
    dtype: str
    cache: str
    capacity: int | None
    decoder_layers: int  # none: a module's
    plugin_layers: int
    layers: dict[str, int]  # of the parsed network, by type
    profiles: dict[str, Profile]  # in the engine's order
    model_sha256: str
    plan_sha256: str
    plan_bytes: int
    plugin_sha256: str | None
    plugin_embedded: bool
    compiler: str | None
    headers: str | None
    seconds: dict[str, float]
    options: BuildConfig

    def __post_init__(self) -> None:
        needed = {"batch", "total_sequence"} if self.decoder_layers else set[str]()
        fitting = all(needed <= profile.keys() for profile in self.profiles.values())
        if not self.profiles or not fitting or not (self.decoder_layers or "module" in self.profiles):
            raise ConfigError(
                f"profiles {cut(', '.join(self.profiles)) or 'missing'}: not those of such an engine", hint=BUILD_IT
            )

    def max(self, size: str) -> int:
        """The largest value of a symbolic size that a profile holds."""
        return max(profile[size].max for profile in self.profiles.values())

    @property
    def gpus(self) -> str:
        """What it runs on, in words."""
        return ", ".join(self.architectures) or "the GPU it was built on"

    @property
    def described(self) -> str:
        """In a few words."""
        rotations = f"{self.plugin_layers} plugin layers" if self.plugin_layers else "no plugin"
        if not self.decoder_layers:
            sizes = [f"{name} {size.min} to {size.max:,}" for name, size in self.profiles["module"].items()]
            return ", ".join((rotations, *sizes, f"for {self.gpus}"))
        room = f"up to {self.max('batch')} rows and {self.max('total_sequence'):,} tokens"
        return f"{self.decoder_layers} decoder layers, {rotations}, {room}, for {self.gpus}"


def plan_name(target: str) -> str:
    """The name of the plan for `target` within a bundle; one that every file system and artifact store takes."""
    return f"{FOLDER}/{target.replace(':', '-')}.plan"


def record_name(target: str) -> str:
    """The name of that plan's record within a bundle."""
    return f"{FOLDER}/{target.replace(':', '-')}.json"


def names_before(target: str) -> tuple[str, str]:
    """The names of a target's plan and of its record in bundles of format version 1, which had colons in them."""
    return f"{FOLDER}/{target}.plan", f"{FOLDER}/{target}.json"


def plan_in(bundle: Bundle, record: EngineRecord) -> str:
    """The name within this bundle of the plan that `record` describes; format version 1 had other names."""
    return bundle.manifest.having(plan_name(record.target), names_before(record.target)[0]) or plan_name(record.target)


def records(bundle: Bundle) -> list[EngineRecord]:
    """The records of all engines in the bundle, in the order in which they were built.

    Raises BackendError where a file that should be a record is not one.
    """
    names = [name for name in bundle.manifest.files if name.startswith(f"{FOLDER}/") and name.endswith(".json")]
    paths, engines = [bundle.path / name for name in names], []
    for path in paths:
        check_file(path, raises=BackendError, hint=BUILD_IT)
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            engines.append(read_record(path, EngineRecord))
        except DocumentError as cause:
            raise BackendError(f"not an engine's record: {cause}", hint=BUILD_IT) from cause
    return engines


def newest_engine(bundle: Bundle) -> EngineRecord:
    """The record of the engine that was built last.

    Raises BackendError where the bundle has no engine, where that one was built from another model, or where the plan
    is not the one that the record describes.
    """
    if not (engines := records(bundle)):
        raise BackendError(f"{bundle.path} has no engine", hint=BUILD_IT)
    record, plan = engines[-1], bundle.path / plan_in(bundle, engines[-1])
    if record.model_sha256 != bundle.manifest.files[MODEL]:
        raise BackendError(f"{plan}: the engine was built from another {MODEL}", hint=BUILD_IT)
    if not plan.is_file() or sha256(plan) != record.plan_sha256:
        raise BackendError(f"{plan}: not the plan that its record describes", hint=BUILD_IT)
    return record
