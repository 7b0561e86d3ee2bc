"""Failures a user can act on, and the door to optional libraries."""

import importlib
from types import ModuleType


class FopeError(Exception):
    """One message that says where, what was expected and what came; `hint` is the next step."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(FopeError):
    """A configuration that no model can have."""


class CheckpointError(FopeError):
    """A checkpoint that cannot be read, or that contradicts itself."""


class ExportError(FopeError):
    """A model that cannot be written as ONNX."""


class BundleError(FopeError):
    """A folder that is not, or no longer, the bundle its manifest describes."""


class BackendError(FopeError):
    """A backend that cannot run here, or a request it cannot serve."""


class ParityError(FopeError):
    """A comparison that could not be made. (One that was made and failed is a result, not an error.)"""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional `module`, or say which extra brings it.

    Raises BackendError when it is missing or when it is installed but fails to load.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as cause:
        if cause.name != module.partition(".")[0]:
            raise BackendError(f"{module} is installed but broken: {cause}", hint=f"Reinstall {module}.") from cause
        raise BackendError(f"{module} is not installed", hint=f"pip install 'fope-export[{extra}]'") from cause
    except (ImportError, OSError) as cause:
        raise BackendError(f"{module} is installed but does not load: {cause}", hint=f"Reinstall {module}.") from cause
