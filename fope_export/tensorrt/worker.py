"""The process that builds one engine: TensorRT may end a process, and must be loaded before others touch it.

Reads a request as JSON from stdin and writes lines of JSON to stdout: progress, then what was built, or an error.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from fope_export.config import BuildConfig
from fope_export.errors import BackendError, FopeError
from fope_export.fope import contract
from fope_export.processes import answering
from fope_export.scratch import scratch
from fope_export.tensorrt import api

PLUGIN_LAYER = "PLUGIN_V3"
EVERY = 0.1
"""Seconds between two reports of progress."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to build: from `model` into `plan`, with the shapes [min, opt, max] of each input in each profile."""

    model: str
    plan: str
    config: BuildConfig
    profiles: list[dict[str, list[tuple[int, ...]]]]
    plugin: str | None
    plugin_layers: int  # wanted
    timing_cache: str | None


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    library_version: str
    layers: dict[str, int]  # by type
    seconds: dict[str, float]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why nothing came of it."""

    message: str
    hint: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is."""

    phase: str
    done: int
    total: int


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of output: one of these."""

    progress: Progress | None = None
    built: Built | None = None
    failure: Failure | None = None


def build(request: Request, report: Callable[[Progress], None]) -> Built:
    """Parse, check and build.

    Raises BackendError with the node, layer, flag or architecture that was refused.
    """
    config = request.config
    trt = api.load(config.library)
    log = api.make_log(trt)
    builder = _builder(trt, log)
    if request.plugin:
        versions = map(str, contract.VERSIONS)
        api.load_plugin(
            trt, Path(request.plugin), log, name=contract.NAME, versions=versions, namespace=contract.DOMAIN
        )
    started = time.perf_counter()
    network = builder.create_network()
    layers = _parse(trt, network, log, request)
    parsed = time.perf_counter()
    settings = _settings(trt, builder, request)
    settings.progress_monitor = _monitor(trt, report)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise BackendError(
            f"{trt.__name__} does not build the engine: {log.errors()}", hint=_advice(log.errors(), config)
        )
    Path(request.plan).write_bytes(plan)
    if request.timing_cache and (timings := settings.get_timing_cache()):
        _keep(Path(request.timing_cache), bytes(timings.serialize()))
    seconds = {"parse": parsed - started, "build": time.perf_counter() - parsed}
    return Built(library_version=trt.__version__, layers=layers, seconds=seconds)


def _builder(trt: ModuleType, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except TypeError as cause:  # how the bindings say that there is no builder
        raise BackendError(
            f"{trt.__name__} cannot start: {log.errors() or cause}",
            hint="It needs an NVIDIA GPU and its driver; --target tensorrt-rtx builds without one.",
        ) from cause


def _parse(trt: ModuleType, network: Any, log: Any, request: Request) -> dict[str, int]:
    """Fill the network from the model; the number of its layers by type."""
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{e.node_operator() or 'graph'} {e.node_name()}: {e.desc()}" for e in errors)
        raise BackendError(
            f"{trt.__name__} {trt.__version__} does not take {request.model}: {told or log.errors()}",
            hint="An operator it does not support; a newer TensorRT may. `fope-export inspect` shows the graph.",
        )
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    counts = Counter(layer.type.name for layer in layers)
    if counts[PLUGIN_LAYER] != request.plugin_layers:
        raise BackendError(
            f"{counts[PLUGIN_LAYER]} of {request.plugin_layers} {contract.NAME} nodes became plugin layers",
            hint="The nodes' plugin_namespace or plugin_version does not match the plugin: export again.",
        )
    _allow_parts(trt, layers)
    return dict(counts)


def _allow_parts(trt: ModuleType, layers: Sequence[Any]) -> None:
    """Let attention be built of several kernels where no fused one takes it: float32, or fewer than 4 query heads.
    Where a fused one does, it is taken as before.
    """
    if hasattr(trt, "IAttentionInputLayer"):
        for layer in layers:
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer  # get_layer() does not say which layer it is
                layer.attention.decomposable = True


def _settings(trt: ModuleType, builder: Any, request: Request) -> Any:
    config, settings = request.config, builder.create_builder_config()
    for profile in request.profiles:
        shapes = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            shapes.set_shape(name, smallest, usual, largest)
        settings.add_optimization_profile(shapes)
    _set_flags(trt, settings, config)
    if request.plugin:
        settings.plugins_to_serialize = [request.plugin]
    capabilities = _capabilities(trt, config)
    if capabilities:
        settings.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        settings.set_compute_capability(capability, i)
    if request.timing_cache:
        _use_timings(settings, Path(request.timing_cache))
    return settings


def _use_timings(settings: Any, known: Path) -> None:
    """Take what earlier builds measured, unless it is damaged or cannot be read."""
    content = b""
    with suppress(OSError):
        content = known.read_bytes() if known.is_file() else b""
    for each in (content, b""):
        cache = settings.create_timing_cache(each)
        if cache is not None and settings.set_timing_cache(cache, ignore_mismatch=True):
            return


def _set_flags(trt: ModuleType, settings: Any, config: BuildConfig) -> None:
    flags = {
        "TF32": config.tf32, "REFIT": config.refit, "STRIP_PLAN": config.strip,
        "VERSION_COMPATIBLE": config.version_compatible, "EXCLUDE_LEAN_RUNTIME": config.version_compatible,
    }  # fmt: skip
    for name, wanted in flags.items():
        (settings.set_flag if wanted else settings.clear_flag)(getattr(trt.BuilderFlag, name))
    if config.hardware_compatible:
        settings.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _capabilities(trt: ModuleType, config: BuildConfig) -> list[Any]:
    if not config.architectures:
        return []
    known = {f"sm{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    if unknown := [name for name in config.architectures if name not in known]:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} has no {', '.join(unknown)}",
            hint=f"It builds for {', '.join(sorted(known, key=lambda name: int(name[2:])))}.",
        )
    return [known[name] for name in config.architectures]


def _advice(errors: str, config: BuildConfig) -> str:
    if config.refit or config.strip:
        return "Refit and strip need a GPU while building, and one target: leave them out, or build where it is."
    if "supported plugin/custom tactic format" in errors:
        return "The plugin takes float32, float16 and bfloat16, and 64-bit positions: export again with --dtype."
    return "Try --no-plugin; --max-batch and --max-length decide how much memory is needed."


def _monitor(trt: ModuleType, report: Callable[[Progress], None]) -> Any:
    """TensorRT's progress as the innermost phase and its steps, a few times a second."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.totals: dict[str, int] = {}
            self.last = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self.totals[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self.totals.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            if (now := time.monotonic()) - self.last > EVERY:
                self.last = now
                report(Progress(phase=phase, done=step, total=self.totals.get(phase, step)))
            return True

    return Monitor()


def _keep(path: Path, content: bytes) -> None:
    """Write a file that only saves time: the engine does not depend on it."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path.parent) as folder:
            (folder / path.name).write_bytes(content)
            (folder / path.name).replace(path)


def main() -> None:
    """Serve one request."""
    with answering() as answer:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        try:
            answer(Line(built=build(request, lambda progress: answer(Line(progress=progress)))))
        except FopeError as error:
            answer(Line(failure=Failure(message=str(error), hint=error.hint)))


if __name__ == "__main__":
    main()
