"""A second file of the model for ONNX Runtime alone: the same weights, in the operators that it runs fastest.

Each of FUSIONS changes one thing, and no number; names of inputs and outputs stay.
"""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassError, Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from fope_export.bundle import Bundle
from fope_export.errors import ConfigError, ExportError, cut
from fope_export.graph.companions import for_genai
from fope_export.graph.experts import FuseExperts
from fope_export.graph.export import check
from fope_export.graph.fusion import FuseAttention, FuseSkipNorm, KeepLastLogits
from fope_export.graph.passes import widening
from fope_export.graph.reading import load_onnx
from fope_export.graph.series import ShareSeries
from fope_export.graph.ways import way_of
from fope_export.lock import TIMEOUT
from fope_export.manifest import MODEL, OPTIMIZED, OPTIMIZED_BEFORE
from fope_export.place import OURS

FUSIONS: tuple[InPlacePass, ...] = (
    ShareSeries(), FuseAttention(), KeepLastLogits(), FuseExperts(), FuseSkipNorm()
)  # fmt: skip


def _save(model: ir.Model, path: Path) -> None:
    try:
        ir.save(model, path)
    except ir.serde.SerdeError as cause:  # what a damaged file brought along
        raise ExportError(
            f"{path.name} cannot be written: {cut(cause)}", hint="Export the checkpoint again."
        ) from cause


def optimize(bundle: str | Path | Bundle, *, int8_activations: bool = True, lock_timeout: float = TIMEOUT) -> Bundle:
    """Add a second file on the same weights to a decoder's bundle, in the operators that ONNX Runtime runs fastest, and
    have ONNX Runtime GenAI load it; the bundle that has it. It computes what the portable file computes, except where
    weights are quantized: then `int8_activations` rounds activations to 8 bits too, which is faster. Another writer of
    the bundle is waited for, for `lock_timeout` seconds.

    Raises ConfigError for a static cache, BundleError for the bundle of a module, and ExportError where the portable
    file is not as this package writes it; then the bundle is as it was.

    >>> import fope_export as fx
    >>> fx.optimize("out").manifest.optimized
    'model.ort.onnx'
    """
    with Bundle.of(bundle, verify=True).changing(lock_timeout) as now:
        return _optimized(now, int8_activations)


def _optimized(bundle: Bundle, int8_activations: bool) -> Bundle:
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
    portable = bundle.model
    try:
        model = Sequential(*passes, ShapeInferencePass())(load_onnx(portable)).model
    except PassError as cause:
        raise ExportError(f"{bundle.model} cannot be optimized: {cause.__cause__}", hint="Export it again.") from cause
    model.metadata_props["fope.optimized"] = bundle.manifest.files[MODEL]
    partial = portable.with_name(f"{OURS}{OPTIMIZED}")  # beside its weights
    try:
        _save(model, partial)
        check(partial)
        added: dict[str, bytes | Path] = {OPTIMIZED: partial, **for_genai(config, export, optimized=True)}
        return bundle.put(added, without=(OPTIMIZED_BEFORE,))
    finally:
        partial.unlink(missing_ok=True)
