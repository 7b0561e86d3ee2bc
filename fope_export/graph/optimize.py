"""What a bundle gets for one runtime alone. For ONNX Runtime that is a second file on the same weights, in the
operators that it runs fastest: each of FUSIONS changes one thing, and no number; names of inputs and outputs stay. For
OpenVINO it is a folder of its own (`graph.openvino`).
"""

import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassError, Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from fope_export.bundle import Bundle
from fope_export.dtypes import either
from fope_export.errors import ConfigError, ExportError, cut
from fope_export.graph.caches import RoundCaches, calibrated_on, measure
from fope_export.graph.companions import for_genai
from fope_export.graph.experts import FuseExperts
from fope_export.graph.export import check
from fope_export.graph.fusion import FuseAttention, FuseSkipNorm, KeepLastLogits
from fope_export.graph.inlining import CallRotary
from fope_export.graph.passes import rewritten, widening
from fope_export.graph.reading import load_onnx
from fope_export.graph.series import ShareSeries
from fope_export.graph.ways import way_of
from fope_export.lock import TIMEOUT
from fope_export.manifest import CALIBRATED_ON, MODEL, OPTIMIZED, OPTIMIZED_BEFORE, ROUNDED_CACHE
from fope_export.place import OURS
from fope_export.quantizations import CACHES, EXACT_CACHE, CacheRounding
from fope_export.scratch import scratch

ONNXRUNTIME, OPENVINO = TARGETS = ("onnxruntime", "openvino")
FUSIONS: tuple[InPlacePass, ...] = (
    ShareSeries(), FuseAttention(), KeepLastLogits(), FuseExperts(), FuseSkipNorm()
)  # fmt: skip

ROUNDED = (ROUNDED_CACHE, CALIBRATED_ON)
MADE = "made.data"
"""Constants of a graph for another program that the portable file lacks; gone with it."""


def _save(model: ir.Model, path: Path) -> None:
    try:
        ir.save(model, path)
    except ir.serde.SerdeError as cause:  # what a damaged file brought along
        raise ExportError(
            f"{path.name} cannot be written: {cut(cause)}", hint="Export the checkpoint again."
        ) from cause


def optimize(
    bundle: str | Path | Bundle,
    target: str = ONNXRUNTIME,
    *,
    int8_activations: bool = True,
    cache: str | None = None,
    calibration: Path | None = None,
    lock_timeout: float = TIMEOUT,
) -> Bundle:
    """Add to a decoder's bundle what one of TARGETS runs fastest; the bundle that has it. It computes what the portable
    file computes. For "onnxruntime" it is a second file on the same weights, which ONNX Runtime GenAI loads too; where
    weights are quantized, `int8_activations` rounds activations to 8 bits, which is faster. For "openvino" it is the
    folder openvino/, which OpenVINO GenAI and optimum-intel open as well. `cache` is how the bundle is to keep keys and
    values in both: a name of `quantizations.CACHES`, or "float" for not rounded (None: as it was chosen before). Where
    ONNX Runtime rounds them, a third file does it, in steps that are measured on `calibration`, which is text for the
    bundle's tokenizer or token ids as .npy or .json (None: Python's standard library). Another writer of the bundle is
    waited for, for `lock_timeout` seconds.

    Raises ConfigError for another target, and where the bundle has what the target does not take, as a static cache;
    BundleError for the bundle of a module, BackendError where a package is not installed, and ExportError where the
    portable file is not as this package writes it; then the bundle is as it was.

    >>> import fope_export as fx
    >>> fx.optimize("out").manifest.optimized
    'model.ort.onnx'
    """
    if target not in TARGETS:
        raise ConfigError(f"nothing is optimized for {cut(target)}", hint=f"One of: {', '.join(TARGETS)}.")
    if target == OPENVINO and not int8_activations:
        raise ConfigError(
            "whether OpenVINO rounds activations is chosen when it loads the file, and not in it",
            hint="Leave --no-int8-activations out; from Python, load_backend(bundle, 'openvino', variant='ir').",
        )
    if cache not in (None, EXACT_CACHE, *CACHES):
        raise ConfigError(f"cache is {cut(cache)}", hint=f"One of: {', '.join((EXACT_CACHE, *CACHES))}.")
    with Bundle.of(bundle, verify=True).changing(lock_timeout) as now:
        row = now.manifest.cache_rounding if cache is None else CACHES.get(cache)
        if calibration and (row is None or target == OPENVINO):
            raise ConfigError(
                f"{calibration} calibrates nothing",
                hint=f"Choose --cache {either(CACHES.values())} --for {ONNXRUNTIME}, or leave it out.",
            )
        if target == OPENVINO:
            return _for_openvino(now, row)
        return _for_onnxruntime(now, int8_activations, row, calibration)


def _for_onnxruntime(
    bundle: Bundle, int8_activations: bool, row: CacheRounding | None, calibration: Path | None
) -> Bundle:
    config, export = bundle.manifest.decoder(), bundle.manifest.export
    if export.cache == "static":
        raise ConfigError(
            f"{bundle.path} has a static cache, and what is optimized is the growing one",
            hint="Export with --cache dynamic; the optimized file then writes its cache in place.",
        )
    passes: list[InPlacePass] = [*FUSIONS, TopologicalSortPass(), RemoveUnusedNodesPass()]
    if int8_activations and export.quantization:
        passes += way_of(export.quantization).fast()
    passes += widening(export)
    with _edited(bundle, [*passes, ShapeInferencePass()]) as partial:
        check(partial)
        added: dict[str, bytes | Path] = {OPTIMIZED: partial, **for_genai(config, export, optimized=True)}
        with _rounded(bundle, partial, row, calibration) as more:
            return bundle.put(added | more, without=(OPTIMIZED_BEFORE, *ROUNDED), cache=_said(row))


@contextmanager
def _rounded(
    bundle: Bundle, partial: Path, row: CacheRounding | None, calibration: Path | None
) -> Iterator[dict[str, bytes | Path]]:
    """What the bundle gets where its caches are rounded, made from the optimized file: there until the block ends."""
    if row is None:
        yield {}
        return
    windows, tokens = calibrated_on(bundle, calibration), io.BytesIO()
    np.save(tokens, windows)
    made = partial.with_name(f"{OURS}{ROUNDED_CACHE}")
    try:
        rewritten(partial, made, [RoundCaches(row, measure(bundle, windows))])
        yield {ROUNDED_CACHE: made, CALIBRATED_ON: tokens.getvalue()}
    finally:
        made.unlink(missing_ok=True)


def _said(row: CacheRounding | None) -> str | msgspec.UnsetType:
    """What the manifest says of it."""
    return row.name if row else msgspec.UNSET


def _for_openvino(bundle: Bundle, row: CacheRounding | None) -> Bundle:
    from fope_export.graph import openvino

    bundle.manifest.decoder()
    passes = openvino.passes_for(bundle)
    with _edited(bundle, passes, apart=True) as partial, scratch(bundle.path.parent) as folder:
        openvino.convert(partial, folder)
        openvino.write_tokenizer(bundle, folder)
        for name in openvino.files_beside(bundle):
            shutil.copy(bundle.path / name, folder)
        added: dict[str, bytes | Path] = {f"{OPENVINO}/{path.name}": path for path in sorted(folder.iterdir())}
        before = [name for name in bundle.manifest.files if name.startswith(f"{OPENVINO}/")]
        return bundle.put(added, without=[*before, *(() if row else ROUNDED)], cache=_said(row))


@contextmanager
def _edited(bundle: Bundle, passes: Sequence[InPlacePass], *, apart: bool = False) -> Iterator[Path]:
    """A file of what passes make of the portable one, beside its weights, until the block ends; `apart` from it are
    constants that it has not. Raises ExportError where the passes do not take it.
    """
    portable = bundle.model
    again = [CallRotary()] if bundle.manifest.export.inline else []
    made, partial = (portable.with_name(f"{OURS}{name}") for name in (MADE, OPTIMIZED))
    try:
        model = Sequential(*again, *passes)(load_onnx(portable)).model
    except PassError as cause:
        raise ExportError(f"{bundle.model} cannot be optimized: {cause.__cause__}", hint="Export it again.") from cause
    model.metadata_props["fope.optimized"] = bundle.manifest.files[MODEL]
    try:
        if apart:
            _write_made(model, made)
        _save(model, partial)
        yield partial
    finally:
        for path in (made, partial):
            path.unlink(missing_ok=True)


def _write_made(model: ir.Model, path: Path) -> None:
    """Write the constants that are made only now to a file, so that no more than one of them is in memory."""
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            if isinstance(tensor := value.const_value, ir.LazyTensor):
                start = file.tell()
                tensor.tofile(file)
                value.const_value = ir.ExternalTensor(
                    path.name, start, file.tell() - start, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                    name=tensor.name or "", base_dir=path.parent,
                )  # fmt: skip
