"""Bundle to engine: preflight, the plugin, a worker process, and the plan with its record in the bundle."""

import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import IO

import msgspec

from fope_export.bundle import Bundle, sha256
from fope_export.config import BuildConfig
from fope_export.dtypes import DTYPES, FP16, either
from fope_export.errors import BackendError, ConfigError
from fope_export.fope import contract
from fope_export.lock import TIMEOUT
from fope_export.manifest import MODEL, ModuleRecord
from fope_export.place import OURS
from fope_export.processes import child, environment, python
from fope_export.quantizations import EXACT_CACHE, QUANTIZATIONS
from fope_export.tensorrt import api, compile, profiles
from fope_export.tensorrt.record import EngineRecord, names_before, plan_name, record_name
from fope_export.tensorrt.worker import PLUGIN_LAYER, Built, Line, Request


def build(
    bundle: str | Path | Bundle,
    config: BuildConfig | None = None,
    *,
    lock_timeout: float = TIMEOUT,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Bundle, EngineRecord]:
    """Build a TensorRT engine from a bundle's portable file, and add it with its record to the bundle; both the bundle
    that has it and the record. With the plugin, every rotation must become one layer of the plugin, and without it
    none.

    Another writer of the bundle is waited for, for `lock_timeout` seconds. `report` is told the phase, how many of its
    steps are done, and how many there are.

    Raises ConfigError where `config` and the bundle do not go together, and BackendError where the library or the
    compiler is not installed, or refuses; the bundle is then as it was.

    >>> import fope_export as fx
    >>> bundle, record = fx.build("out", fx.BuildConfig(plugin=False, max_batch=1, max_length=64))
    >>> record.described
    '2 decoder layers, no plugin, up to 1 rows and 64 tokens, for sm86, sm89, sm120'
    """
    with Bundle.of(bundle, verify=True).changing(lock_timeout) as now:
        return _built(now, config or BuildConfig(), report)


def _built(bundle: Bundle, config: BuildConfig, report: Callable[[str, int, int], None]) -> tuple[Bundle, EngineRecord]:
    manifest = bundle.manifest
    if manifest.export.inline and config.plugin:
        raise ConfigError(
            f"{bundle.path} is exported with --inline: no node of it is a {contract.NAME} that the plugin could take",
            hint="Build with --no-plugin, or export without --inline.",
        )
    ranges = profiles.make_profiles(config, manifest)
    _check_numbers(bundle, config)
    api.check_installed(config.library)
    tools, plugin = _plugin(config, report) if config.plugin else (None, None)
    layers = 0 if isinstance(manifest.model, ModuleRecord) else manifest.model.num_layers
    rotations = manifest.model.calls if isinstance(manifest.model, ModuleRecord) else layers
    with tempfile.TemporaryDirectory(dir=bundle.path, prefix=OURS) as scratch:
        plan = Path(scratch) / "plan"
        request = Request(
            model=str(bundle.model.resolve()), plan=str(plan.resolve()), config=config,
            profiles=[{p.name: profiles.shapes(ranges[name], p) for p in manifest.inputs} for name in ranges],
            plugin=str(plugin) if plugin else None, plugin_layers=rotations if plugin else 0,
            timing_cache=str(_timing_cache(config)) if config.timing_cache else None,
        )  # fmt: skip
        built = _work(request, report)
        record = EngineRecord(
            target=config.target, library=config.library, library_version=built.library_version,
            architectures=config.architectures, dtype=manifest.export.dtype, cache=manifest.export.cache,
            capacity=manifest.export.capacity, decoder_layers=layers, plugin_layers=built.layers.get(PLUGIN_LAYER, 0),
            layers=built.layers, profiles=ranges, model_sha256=manifest.files[MODEL], plan_sha256=sha256(plan),
            plan_bytes=plan.stat().st_size, plugin_sha256=sha256(plugin) if plugin else None,
            plugin_embedded=plugin is not None, compiler=f"nvcc {tools.nvcc_version}" if tools else None,
            headers=tools.headers_version if tools else None,
            seconds={name: round(value, 3) for name, value in built.seconds.items()}, options=config,
        )  # fmt: skip
        content = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
        added: dict[str, bytes | Path] = {plan_name(config.target): plan, record_name(config.target): content}
        return bundle.put(added, without=names_before(config.target)), record


def _check_numbers(bundle: Bundle, config: BuildConfig) -> None:
    """Raises ConfigError where TensorRT or a GPU of the target does not multiply what the bundle holds."""
    dtype, row = DTYPES[bundle.manifest.export.dtype], bundle.manifest.export.quantization
    ways = [way for way in QUANTIZATIONS.values() if way.engines]
    if row and not row.engines:
        raise ConfigError(
            f"{bundle.path} has {row.name} weights for an operator that only ONNX Runtime has",
            hint=f"Export with --quantize {either(ways)}, "
            f"or without and with --dtype {FP16.name}, and build from that.",
        )
    if rounded := bundle.manifest.cache_rounding:
        raise ConfigError(
            f"{bundle.path} keeps keys and values as {rounded.name}, and TensorRT writes caches of 16 or 32 bits alone",
            hint=f"fope-export optimize {bundle.path} --cache {EXACT_CACHE}, then build.",
        )
    if row and (older := _older(config, row.architecture)):
        usual = BuildConfig()
        newer = [name for name in usual.architectures if name not in _older(usual, row.architecture)]
        raise ConfigError(
            f"{', '.join(older)} has no {row.product}, which {bundle.path} multiplies in",
            hint=f"Build with --target {usual.library}:{','.join(newer)}, or export with --quantize "
            f"{either(way for way in ways if not _older(config, way.architecture))} for it.",
        )
    if older := _older(config, dtype.architecture):
        raise ConfigError(
            f"{', '.join(older)} has no {dtype.precision}",
            hint=f"Export with --dtype {FP16.name} for it, or leave it out.",
        )


def _older(config: BuildConfig, architecture: int) -> list[str]:
    """The GPUs of the target that came before sm<architecture>."""
    return [name for name in config.architectures if int(name.removeprefix("sm")) < architecture]


def _plugin(config: BuildConfig, report: Callable[[str, int, int], None]) -> tuple[compile.Toolchain, Path]:
    """The compiled plugin for the target, and what compiled it."""
    tools = compile.find_toolchain()
    if tools.headers_version is not None:
        compile.check_headers(tools.headers_version, api.installed_version(config.library)[0])
    report("compiling the plugin", 0, 1)
    wanted = tuple(name.removeprefix("sm") for name in config.architectures)
    return tools, compile.build_plugin(tools, wanted or compile.ARCHITECTURES)


def _timing_cache(config: BuildConfig) -> Path:
    version = ".".join(map(str, api.installed_version(config.library)))
    return compile.cache_folder() / f"timing-{config.library}-{version}.cache"


def _work(request: Request, report: Callable[[str, int, int], None]) -> Built:
    """Have a worker serve the request."""
    command = python("fope_export.tensorrt.worker")
    temporary = {"TMPDIR": str(Path(request.plan).parent)}
    with (
        tempfile.TemporaryFile() as noise,
        child(command, stdin=PIPE, stdout=PIPE, stderr=noise, env=environment(temporary)) as process,
    ):
        assert process.stdin and process.stdout
        process.stdin.write(msgspec.json.encode(request))
        process.stdin.close()
        for text in process.stdout:
            line = msgspec.json.decode(text, type=Line)
            if line.progress:
                report(line.progress.phase, line.progress.done, line.progress.total)
            if line.failure:
                told = [text for text in _lines(noise) if text.startswith(contract.NAME)]  # the plugin's own words
                raise BackendError("; ".join((line.failure.message, *told)), hint=line.failure.hint)
            if line.built:
                return line.built
        code, last = process.wait(), _lines(noise)[-3:]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise BackendError(
            f"{request.config.library} ended its process with {how}: {' '.join(last) or 'it said nothing'}",
            hint="Is there memory left? Try --no-plugin and a smaller --max-length.",
        )


def _lines(noise: IO[bytes]) -> list[str]:
    """What a worker and its libraries printed."""
    noise.seek(0)
    return noise.read().decode(errors="replace").strip().splitlines()
