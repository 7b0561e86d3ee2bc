"""What rows of `choose.BACKENDS` are made of: a variant's files in a bundle, why there are none, what loads them."""

from typing import TYPE_CHECKING

from fope_export.bundle import Bundle
from fope_export.dtypes import DTYPES, either
from fope_export.errors import BackendError
from fope_export.manifest import OPENVINO, ROUNDED_CACHE, plain_file, weights_file
from fope_export.quantizations import CACHES, in_blocks

if TYPE_CHECKING:  # the doctor has no NumPy
    from fope_export.backends.base import Backend
    from fope_export.backends.choose import Settings


def load_ort(bundle: Bundle, settings: "Settings") -> "Backend":
    """The portable file in ONNX Runtime."""
    from fope_export.backends.ort import OrtBackend

    return OrtBackend(bundle, threads=settings.threads)


def load_ort_optimized(bundle: Bundle, settings: "Settings") -> "Backend":
    """The optimized file there."""
    from fope_export.backends.ort_optimized import OptimizedOrtBackend

    return OptimizedOrtBackend(bundle, threads=settings.threads)


def graph(name: str, bundle: Bundle) -> tuple[str, ...]:
    """An ONNX file, and those with its weights."""
    return name, *(
        each for each in bundle.manifest.files if each in {f"{name}.data", weights_file(bundle.manifest.export)}
    )


def portable(bundle: Bundle) -> tuple[str, ...]:
    """Of the portable file, or its copy in a dtype that all runtimes have."""
    return graph(plain_file(bundle.manifest.export), bundle)


def optimized(bundle: Bundle) -> tuple[str, ...]:
    """Of the optimized file."""
    return graph(bundle.manifest.optimized, bundle)


def rounded_cache(bundle: Bundle) -> tuple[str, ...]:
    """Of the file whose cache is rounded."""
    return graph(ROUNDED_CACHE, bundle)


def load_ort_rounded_cache(bundle: Bundle, settings: "Settings") -> "Backend":
    """That file in ONNX Runtime."""
    from fope_export.backends.ort_optimized import OptimizedOrtBackend

    return OptimizedOrtBackend(bundle, threads=settings.threads, file=ROUNDED_CACHE)


def without_rounded_cache(bundle: Bundle) -> BackendError | None:
    """Why there is none."""
    if ROUNDED_CACHE in bundle.manifest.files:
        return None
    chosen = either(CACHES.values())
    return BackendError(f"{bundle.path} has no {ROUNDED_CACHE}", hint=f"fope-export optimize --cache {chosen}.")


def without_optimized(bundle: Bundle) -> BackendError | None:
    """Why there is none."""
    if bundle.manifest.optimized:
        return None
    return BackendError(f"{bundle.path} has no optimized file", hint="Make it with `fope-export optimize`.")


def ir(bundle: Bundle) -> tuple[str, ...]:
    """Of OpenVINO's folder."""
    return tuple(name for name in (OPENVINO, OPENVINO.replace(".xml", ".bin")) if name in bundle.manifest.files)


def without_ir(bundle: Bundle) -> BackendError | None:
    """Why there is none."""
    if OPENVINO in bundle.manifest.files:
        return None
    return BackendError(f"{bundle.path} has no {OPENVINO}", hint="fope-export optimize --for openvino.")


def without_rounded_ir(bundle: Bundle) -> BackendError | None:
    """Why it has no inputs to round."""
    if bundle.manifest.export.quantize:
        return without_ir(bundle)
    return BackendError(
        f"{bundle.path} has no quantized weights", hint=f"fope-export export --quantize {either(in_blocks())}."
    )


def without_rounded_ir_cache(bundle: Bundle) -> BackendError | None:
    """Why it rounds no cache."""
    if bundle.manifest.cache_rounding:
        return without_ir(bundle)
    chosen = either(CACHES.values())
    return BackendError(
        f"{bundle.path} keeps keys and values as they are",
        hint=f"fope-export optimize --for openvino --cache {chosen}.",
    )


def without_half(bundle: Bundle) -> BackendError | None:
    """Why ONNX Runtime's attention on a GPU does not take the bundle."""
    taken = [dtype for dtype in DTYPES.values() if dtype.cuda_attention]
    if bundle.manifest.optimized and DTYPES[bundle.manifest.export.dtype] in taken:
        return None
    return BackendError(
        f"{bundle.path} has no optimized file in {' or '.join(dtype.precision for dtype in taken)}, which is what "
        "ONNX Runtime's attention takes on a GPU",
        hint=f"fope-export export --dtype {either(taken)}, then fope-export optimize.",
    )


def load_ort_cuda(bundle: Bundle, settings: "Settings") -> "Backend":
    """The optimized file in ONNX Runtime on a GPU."""
    from fope_export.backends.ort_optimized import OptimizedOrtBackend

    return OptimizedOrtBackend(bundle, threads=settings.threads, device="cuda", cuda_graph=settings.cuda_graph)


def load_openvino(
    bundle: Bundle, settings: "Settings", *, int8_activations: bool = False, cache: bool = False
) -> "Backend":
    """The folder in OpenVINO."""
    from fope_export.backends.openvino import OpenVinoBackend

    return OpenVinoBackend(
        bundle, threads=settings.threads, cache=cache,
        int8_activations=int8_activations or (cache and bundle.manifest.export.quantize is not None),
    )  # fmt: skip


def openvino_arithmetic(bundle: Bundle) -> str:
    """The dtype that OpenVINO computes a bundle in."""
    from fope_export.backends.openvino import arithmetic

    return arithmetic(bundle)
