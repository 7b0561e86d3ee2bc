"""Language models with FoPE, from PyTorch to ONNX and TensorRT, with proof that they compute what PyTorch computes.

Requests that come and go share the slots of one engine:

>>> import fope_export as fx
>>> engine = fx.Engine(fx.load_backend("out"), 2)
>>> handle = engine.submit(fx.Request(prompt=[72, 105], sampling=fx.SamplingParams(max_new_tokens=1)))
>>> while engine.step():
...     pass
>>> handle.take()
[Token(id=...), Finished(reason='length')]
>>> engine.close()

Names load on first use, so that importing the package costs nothing; type checkers see them all. What the package logs,
under the names of its modules, is silent unless a program listens.
"""

import logging
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fope_export.backends.choose import Settings as Settings
    from fope_export.backends.choose import load_backend as load_backend
    from fope_export.benchmark.run import BenchConfig as BenchConfig
    from fope_export.benchmark.run import bench as bench
    from fope_export.bundle import Bundle as Bundle
    from fope_export.config import BuildConfig as BuildConfig
    from fope_export.config import ExportConfig as ExportConfig
    from fope_export.errors import BackendError as BackendError
    from fope_export.errors import BundleError as BundleError
    from fope_export.errors import BusyError as BusyError
    from fope_export.errors import CheckpointError as CheckpointError
    from fope_export.errors import ConfigError as ConfigError
    from fope_export.errors import DocumentError as DocumentError
    from fope_export.errors import ExportError as ExportError
    from fope_export.errors import FopeError as FopeError
    from fope_export.errors import ParityError as ParityError
    from fope_export.evaluation import EvaluationConfig as EvaluationConfig
    from fope_export.evaluation import evaluate as evaluate
    from fope_export.fope.replace import replace_rotary as replace_rotary
    from fope_export.fope.rotary import FopeRotary as FopeRotary
    from fope_export.fope.spectrum import Spectrum as Spectrum
    from fope_export.generation import generate as generate
    from fope_export.generation import generate_text as generate_text
    from fope_export.generation import log_probabilities as log_probabilities
    from fope_export.generation import logits as logits
    from fope_export.graph.export import export as export
    from fope_export.graph.module import export_module as export_module
    from fope_export.graph.optimize import optimize as optimize
    from fope_export.model.checkpoint import load_checkpoint as load_checkpoint
    from fope_export.parity.module import validate_module as validate_module
    from fope_export.parity.run import validate as validate
    from fope_export.parity.stages import validate_stages as validate_stages
    from fope_export.serving.engine import Engine as Engine
    from fope_export.serving.requests import Request as Request
    from fope_export.serving.sampling import SamplingParams as SamplingParams
    from fope_export.serving.speculation import Speculation as Speculation
    from fope_export.tensorrt.build import build as build
    from fope_export.tokens import Tokenizer as Tokenizer

_HOMES = {
    "BackendError": "errors",
    "BenchConfig": "benchmark.run",
    "BuildConfig": "config",
    "Bundle": "bundle",
    "BundleError": "errors",
    "BusyError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DocumentError": "errors",
    "Engine": "serving.engine",
    "EvaluationConfig": "evaluation",
    "ExportConfig": "config",
    "ExportError": "errors",
    "FopeError": "errors",
    "FopeRotary": "fope.rotary",
    "ParityError": "errors",
    "Request": "serving.requests",
    "SamplingParams": "serving.sampling",
    "Settings": "backends.choose",
    "Spectrum": "fope.spectrum",
    "Speculation": "serving.speculation",
    "Tokenizer": "tokens",
    "bench": "benchmark.run",
    "build": "tensorrt.build",
    "evaluate": "evaluation",
    "export": "graph.export",
    "export_module": "graph.module",
    "generate": "generation",
    "generate_text": "generation",
    "load_backend": "backends.choose",
    "load_checkpoint": "model.checkpoint",
    "log_probabilities": "generation",
    "logits": "generation",
    "optimize": "graph.optimize",
    "replace_rotary": "fope.replace",
    "validate": "parity.run",
    "validate_module": "parity.module",
    "validate_stages": "parity.stages",
}
_FORMER = {"Sampling": "SamplingParams", "Text": "Tokenizer", "complete": "generate_text"}
"""Names of the version before, which work in this one."""
__all__ = [*_HOMES]
__version__ = version("fope-export")
logging.getLogger(__name__).addHandler(logging.NullHandler())

if not TYPE_CHECKING:  # or a type checker takes every name for one of ours

    def __getattr__(name: str) -> Any:
        if now := _FORMER.get(name):
            warnings.warn(f"fope_export.{name} is called {now}", DeprecationWarning, stacklevel=2)
            return __getattr__(now)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
