"""Which backends there are, and the choice between them with every reason."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fope_export.backends import variants
from fope_export.backends.machine import Machine, read_machine
from fope_export.backends.versions import too_old
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.dtypes import DTYPES
from fope_export.errors import BackendError, install
from fope_export.tensorrt.api import LIBRARIES
from fope_export.tensorrt.record import BUILD_IT, plan_in, records

if TYPE_CHECKING:  # the doctor has no NumPy
    from fope_export.backends.base import Backend, Limits

PORTABLE = ExportConfig()
RUN = ("numpy", "tokenizers", "jinja2")
"""What all that run a bundle need, beside a runtime."""
EXPORT = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors", "tokenizers")
VALIDATE = (*EXPORT, "jinja2", "matplotlib", "polygraphy")


@dataclass(frozen=True)
class Settings:
    """How a backend is to run: `optimized`, with the file that `fope-export optimize` wrote, where the bundle has it;
    with so many `threads` for one operator (0: as many as the backend likes); and on a GPU in ONNX Runtime with
    decoding captured in a `cuda_graph`.

    >>> import fope_export as fx
    >>> backend = fx.load_backend("out", settings=fx.Settings(optimized=False, threads=1))
    """

    optimized: bool = True
    threads: int = 0
    cuda_graph: bool = False


USUALLY = Settings()


@dataclass(frozen=True)
class Variant:
    """One of the ways in which a backend runs a bundle."""

    name: str
    load: "Callable[[Bundle, Settings], Backend]"
    files: Callable[[Bundle], tuple[str, ...]] = lambda bundle: ()
    """Names of the bundle's files that it runs; the first is what it loads."""
    refusal: Callable[[Bundle], BackendError | None] = lambda bundle: None
    """Why a bundle cannot be run so, or nothing."""
    optimized: bool = False
    """Whether it runs what `fope-export optimize` wrote."""
    captured: bool = False
    """Whether its decoding can be captured in a CUDA graph."""
    exact: bool = False
    """Whether it loads a copy of its file that leaves out the rounding of what linear layers read."""
    rounds: bool = False
    """Whether it is the one before it with something more rounded: then its cost is judged, not its cases."""
    cache: bool = False
    """Whether that are keys and values, as the bundle's manifest says."""


@dataclass(frozen=True)
class Row:
    """A backend: why a machine cannot run it (or nothing), and what a bundle then has room for. Of its variants the
    first is the plainest, and the last that a bundle has is what runs. `too_old` says why its version cannot run a
    bundle that was exported so.
    """

    what: str
    missing: Callable[[Machine], str]
    variants: tuple[Variant, ...]
    limits: "Callable[[Bundle], Limits]" = lambda bundle: _limits()
    too_old: Callable[[Machine, ExportConfig], str] = lambda machine, export: ""
    widens: bool = False
    """Whether it computes a copy where the dtype has one (`Dtype.widened`)."""
    computes: Callable[[Bundle], str] | None = None
    """The dtype that it computes a bundle in here, where only it can tell."""
    rank: int = 0
    """Where nobody chooses, who can run a bundle and has the highest runs it; never one with 0."""
    unfit: Callable[[Bundle, Machine], str] = lambda bundle, machine: ""
    """Why what the bundle has is for another machine, or nothing."""

    def against(self, bundle: Bundle, machine: Machine, *, optimized: bool = True) -> str:
        """Why `machine` cannot run `bundle` so, or nothing."""
        asked = [each for each in self.variants if optimized or not each.optimized]
        refusals = [each.refusal(bundle) for each in asked] or [BackendError("it runs optimized files", hint="")]
        return (
            self.missing(machine)
            or self.too_old(machine, bundle.manifest.export)
            or ("" if None in refusals else str(refusals[-1]))
            or self.unfit(bundle, machine)
        )

    def arithmetic(self, bundle: Bundle) -> str:
        """The dtype that it computes the bundle in."""
        if self.computes:
            return self.computes(bundle)
        dtype = DTYPES[bundle.manifest.export.dtype]
        return ((self.widens and dtype.widened) or dtype).precision

    def variants_of(self, bundle: Bundle) -> tuple[Variant, ...]:
        """Those that the bundle can be run in."""
        return tuple(each for each in self.variants if each.refusal(bundle) is None)

    def variant(self, bundle: Bundle, name: str = "", *, optimized: bool = True) -> Variant:
        """The one called `name`; else the last that the bundle can be run in, or the first, of those that run no
        optimized file. Raises BackendError with the reason where there is none.
        """
        asked = [each for each in self.variants if name in ("", each.name) and (optimized or not each.optimized)]
        refusals = []
        for each in reversed(asked) if optimized else asked:
            if (refusal := each.refusal(bundle)) is None:
                return each
            refusals.append(refusal)
        hint = "Leave --no-optimized out, or choose another --backend."
        raise refusals[-1] if refusals else BackendError(f"{self.what} is all that this backend runs", hint=hint)


def _limits(length: int | None = None) -> "Limits":
    from fope_export.backends.base import Limits

    return Limits(length=length)


def _trt_limits(bundle: Bundle) -> "Limits":
    from fope_export.backends.trt import limits_of

    return limits_of(bundle)


def _engine(bundle: Bundle) -> tuple[str, ...]:
    return tuple(plan_in(bundle, record) for record in records(bundle)[-1:])


def _without_engine(bundle: Bundle) -> BackendError | None:
    try:
        return None if records(bundle) else BackendError(f"{bundle.path} has no engine", hint=BUILD_IT)
    except BackendError as error:
        return error


def _for_another_gpu(bundle: Bundle, machine: Machine) -> str:
    built = records(bundle)[-1].architectures
    if not built or not machine.architectures or set(built) & set(machine.architectures):
        return ""
    return f"the engine is for {', '.join(built)}, and here is {', '.join(machine.architectures)}"


def _load_trt(bundle: Bundle, settings: Settings) -> "Backend":  # noqa: ARG001
    from fope_export.backends.trt import TrtBackend

    return TrtBackend(bundle)


def _load_eager(bundle: Bundle, settings: Settings) -> "Backend":
    import torch

    from fope_export.backends.eager import EagerBackend
    from fope_export.model.checkpoint import source_of

    if settings.threads:
        torch.set_num_threads(settings.threads)
    return EagerBackend(source_of(bundle).model)


def _without_ort(machine: Machine, export: ExportConfig = PORTABLE) -> str:
    for name in ("onnxruntime-gpu", "onnxruntime"):
        if installed := machine.packages.get(name):
            return too_old(name, installed, export) or _without(machine, "run", name, *RUN)
    return f"onnxruntime is not installed: {install('run')}"


def _without_ort_cuda(machine: Machine) -> str:
    if "onnxruntime-gpu" not in machine.packages:
        return f"onnxruntime-gpu is not installed: {install('gpu')}"
    return _without(machine, "gpu", "onnxruntime-gpu", *RUN) or ("" if machine.gpus else "no NVIDIA GPU found")


def _without_trt(machine: Machine) -> str:
    refusals = [library.refusal(machine.packages) or machine.without(name) for name, library in LIBRARIES.items()]
    if all(refusals):
        return "; ".join(refusals)
    return "" if machine.gpus else "no NVIDIA GPU found"


def _without_torch(machine: Machine) -> str:
    return _without(machine, "export", "torch", *RUN)


USUAL = "onnxruntime"
"""What runs a bundle unless another is asked for."""
BACKENDS: dict[str, Row] = {
    USUAL: Row(
        "the bundle in ONNX Runtime on the CPU",
        _without_ort,
        (
            Variant("portable", variants.load_ort, variants.portable, exact=True),
            Variant(
                "optimized",
                variants.load_ort_optimized,
                variants.optimized,
                variants.without_optimized,
                optimized=True,
                exact=True,
            ),
            Variant(
                "cache rounded",
                variants.load_ort_rounded_cache,
                variants.rounded_cache,
                variants.without_rounded_cache,
                optimized=True,
                rounds=True,
                cache=True,
            ),
        ),
        lambda bundle: _limits(bundle.manifest.export.capacity),
        _without_ort,
        widens=True,
        rank=1,
    ),
    "openvino": Row(
        "its IR in OpenVINO on the CPU",
        lambda machine: _without(machine, "openvino", "openvino", *RUN),
        (
            Variant("ir", variants.load_openvino, variants.ir, variants.without_ir, optimized=True),
            Variant(
                "inputs rounded",
                partial(variants.load_openvino, int8_activations=True),
                variants.ir,
                variants.without_rounded_ir,
                optimized=True,
                rounds=True,
            ),
            Variant(
                "cache rounded",
                partial(variants.load_openvino, cache=True),
                variants.ir,
                variants.without_rounded_ir_cache,
                optimized=True,
                rounds=True,
                cache=True,
            ),
        ),
        computes=variants.openvino_arithmetic,
        rank=2,
    ),
    "onnxruntime-cuda": Row(
        "its optimized file in ONNX Runtime on a GPU",
        _without_ort_cuda,
        (
            Variant(
                "optimized",
                variants.load_ort_cuda,
                variants.optimized,
                variants.without_half,
                optimized=True,
                captured=True,
            ),
        ),
        rank=3,
    ),
    "tensorrt": Row(
        "its engine in TensorRT on a GPU",
        _without_trt,
        (Variant("engine", _load_trt, _engine, _without_engine),),
        _trt_limits,
        rank=4,
        unfit=_for_another_gpu,
    ),
    "torch": Row("its checkpoint in PyTorch, eager", _without_torch, (Variant("checkpoint", _load_eager),)),
}


def abilities(machine: Machine) -> dict[str, str]:
    """What a machine could do -> why it cannot, or nothing where it can."""
    runs = {name: row.missing(machine) for name, row in BACKENDS.items()}
    return {
        "export a checkpoint": _without(machine, "export", *EXPORT),
        **{f"run {BACKENDS[name].what}": reason for name, reason in runs.items()},
        "run a static cache in ONNX Runtime": _without_ort(machine, ExportConfig(cache="static")),
        "validate a bundle": runs[USUAL] or _without(machine, "validate", *VALIDATE),
        **{f"build for {name}": _without_builder(name, machine) for name in LIBRARIES},
        "compile the TensorRT plugin": machine.without_compiler,
    }


def _without(machine: Machine, extra: str, *names: str) -> str:
    missing = [name for name in names if name not in machine.packages]
    return f"{', '.join(missing)} not installed: {install(extra)}" if missing else machine.without(*names)


def _without_builder(library: str, machine: Machine) -> str:
    if refusal := LIBRARIES[library].refusal(machine.packages) or machine.without(library):
        return refusal
    return "" if LIBRARIES[library].names_architectures or machine.gpus else "it needs a GPU, and none was found"


def choose(wanted: str | None, machine: Machine, export: ExportConfig = PORTABLE) -> str:
    """The backend `wanted`, or the usual one, for a bundle that was exported so. None takes the place of another.

    Raises BackendError where there is no such backend, or `machine` cannot run it.
    """
    name = USUAL if wanted is None else wanted
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}", hint=f"One of: {', '.join(BACKENDS)}.")
    if reason := BACKENDS[name].missing(machine) or BACKENDS[name].too_old(machine, export):
        others = [other for other, row in BACKENDS.items() if not row.missing(machine) and other != name]
        raise BackendError(
            f"the backend {name} cannot run here: {reason}",
            hint="`fope-export doctor` says what is missing."
            + (f" `run` can also take --backend {' or '.join(others)}." if others else ""),
        )
    return name


def fastest(bundle: Bundle, machine: Machine, *, optimized: bool = True) -> tuple[str, str]:
    """The backend that `machine` runs `bundle` fastest in, and why it is none of those before it: an engine for its
    GPU, then ONNX Runtime on the GPU, OpenVINO on the CPU, and ONNX Runtime there; without `optimized`, none that runs
    what `optimize` wrote. Raises BackendError where it runs in none.
    """
    reasons = list[str]()
    for name, row in sorted(BACKENDS.items(), key=lambda item: -item[1].rank):
        if row.rank:
            if not (reason := row.against(bundle, machine, optimized=optimized)):
                return name, "; ".join(reasons)
            reasons.append(f"{name}: {reason}")
    raise BackendError(f"{bundle.path} runs in nothing here: {'; '.join(reasons)}", hint="See `fope-export doctor`.")


def able(bundle: Bundle, machine: Machine) -> list[str]:
    """The backends that `machine` runs what `bundle` has in, the usual one first. Raises BackendError without that."""
    usual = choose(None, machine, bundle.manifest.export)
    return [usual, *(name for name, row in BACKENDS.items() if row.rank > 1 and not row.against(bundle, machine))]


def load_backend(
    bundle: str | Path | Bundle, wanted: str | None = None, settings: Settings = USUALLY, *, variant: str = ""
) -> "Backend":
    """A backend with `bundle` in it, ready to run. `wanted` is its name, one of those that `fope-export doctor` lists
    (None: ONNX Runtime on the CPU). `variant` names one of the ways in which it runs a bundle, such as "portable"; by
    default it is the fastest that the bundle has a file for and that `settings` allow.

    Raises BackendError when the backend cannot run here, has no such variant of the bundle, or does not load it.

    >>> import fope_export as fx
    >>> fx.load_backend("out", variant="portable").name
    'onnxruntime'
    """
    bundle = Bundle.of(bundle, verify=True)
    row = BACKENDS[choose(wanted, read_machine(), bundle.manifest.export)]
    return row.variant(bundle, variant, optimized=settings.optimized).load(bundle, settings)
