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
from fope_export.graph.export import check
from fope_export.graph.fusion import FuseAttention, FuseSkipNorm, KeepLastLogits
from fope_export.graph.passes import widening
from fope_export.graph.reading import load_onnx
from fope_export.graph.series import ShareSeries
from fope_export.graph.ways import way_of
from fope_export.lock import TIMEOUT
from fope_export.manifest import MODEL, OPTIMISED
from fope_export.place import OURS

FUSIONS: tuple[InPlacePass, ...] = (ShareSeries(), FuseAttention(), KeepLastLogits(), FuseSkipNorm())


def _save(model: ir.Model, path: Path) -> None:
    try:
        ir.save(model, path)
    except ir.serde.SerdeError as cause:  # what a damaged file brought along
        raise ExportError(
            f"{path.name} cannot be written: {cut(cause)}", hint="Export the checkpoint again."
        ) from cause


def optimise(bundle: Bundle, *, int8_activations: bool = True, lock_timeout: float = TIMEOUT) -> Bundle:
    """Add the optimised file to a decoder's bundle, and have ONNX Runtime GenAI load it.

    `int8_activations` concerns bundles with quantised weights alone. Another writer of the bundle is waited for, for
    `lock_timeout` seconds.

    Raises ConfigError for a static cache, ExportError where the file is not as this package writes it.
    """
    with bundle.changing(lock_timeout) as now:
        return _optimised(now, int8_activations)


def _optimised(bundle: Bundle, int8_activations: bool) -> Bundle:
    config, export = bundle.manifest.decoder(), bundle.manifest.export
    if export.cache == "static":
        raise ConfigError(
            f"{bundle.path} has a static cache, and what is optimised is the growing one",
            hint="Export with --cache dynamic; the optimised file then writes its cache in place.",
        )
    passes: list[InPlacePass] = [*FUSIONS, TopologicalSortPass(), RemoveUnusedNodesPass()]
    if int8_activations and export.quantization:
        passes += way_of(export.quantization).fast()
    passes += widening(export)
    portable = bundle.model
    try:
        model = Sequential(*passes, ShapeInferencePass())(load_onnx(portable)).model
    except PassError as cause:
        raise ExportError(f"{bundle.model} cannot be optimised: {cause.__cause__}", hint="Export it again.") from cause
    model.metadata_props["fope.optimised"] = bundle.manifest.files[MODEL]
    partial = portable.with_name(f"{OURS}{OPTIMISED}")  # beside its weights
    try:
        _save(model, partial)
        check(partial)
        return bundle.put({OPTIMISED: partial, **for_genai(config, export, optimised=True)})
    finally:
        partial.unlink(missing_ok=True)
