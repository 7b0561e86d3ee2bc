"""Which ONNX Runtime can run which bundle; told without importing it."""

from collections.abc import Callable, Iterator
from operator import itemgetter

from fope_export.config import ExportConfig
from fope_export.dtypes import either
from fope_export.quantizations import QUANTIZATIONS, CacheRounding
from fope_export.tensorrt.api import version_of

NEEDS: tuple[tuple[tuple[int, int], str, Callable[[ExportConfig], bool]], ...] = (
    ((1, 25), "a static cache", lambda export: export.cache == "static"),
    ((1, 24), "opset 24", lambda export: export.opset == 24),
    ((1, 23), "opset 23", lambda export: True),
)
"""The first ONNX Runtime that has the operators of a bundle, and by what it is known; newest first."""


def too_old(name: str, version: str, export: ExportConfig, cache: CacheRounding | None = None) -> str:
    """Why the `version` of an ONNX Runtime cannot run a bundle that was exported so, its `cache` so, or nothing."""
    needs = [(oldest, what) for oldest, what, concerned in NEEDS if concerned(export)]
    needs += [(cache.onnxruntime, f"a cache in {cache.name}")] if cache else []
    for oldest, what in sorted([*needs, *_of_quantization(export)], key=itemgetter(0), reverse=True):
        if version_of(version) < oldest:
            wanted = ".".join(map(str, oldest))
            return f"{name} is {version}, and {what} needs {wanted}: pip install '{name}>={wanted}'"
    return ""


def _of_quantization(export: ExportConfig) -> Iterator[tuple[tuple[int, int], str]]:
    """What the way of rounding adds to NEEDS."""
    since = export.quantization.since if export.quantization else ()
    for version, dtype in since:
        if dtype is None or dtype.name == export.dtype:
            alike = either(row for row in QUANTIZATIONS.values() if row.since == since)
            yield version, f"{alike} in {dtype.name}" if dtype else alike
