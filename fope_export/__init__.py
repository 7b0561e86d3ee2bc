"""Language models with FoPE, from PyTorch to ONNX and TensorRT, with proof that they compute what PyTorch computes.

Names load on first use, so that importing the package costs nothing. What the package logs, under the names of its
modules, is silent unless a program listens.
"""

import logging
from importlib import import_module
from importlib.metadata import version
from typing import Any

_HOMES = {
    "BuildConfig": "config",
    "Bundle": "bundle",
    "ExportConfig": "config",
    "FopeError": "errors",
    "FopeRotary": "fope.rotary",
    "Sampling": "sampling",
    "Spectrum": "fope.spectrum",
    "Text": "tokens",
    "build": "engine.build",
    "complete": "generation",
    "export": "graph.export",
    "export_module": "graph.module",
    "load_backend": "backends.choose",
    "load_checkpoint": "model.checkpoint",
    "replace_rotary": "fope.replace",
    "validate": "parity.run",
    "validate_module": "parity.module",
}
__all__ = [*_HOMES]
__version__ = version("fope-export")
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
