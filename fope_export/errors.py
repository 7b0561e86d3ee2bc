"""Failures a user can act on, and the door to optional libraries."""

import importlib
from types import ModuleType

VALUE = 200
"""Characters of a value from outside that a message shows."""
MESSAGE, HINT = 1000, 500
"""Characters of a message and of a hint, whatever went into them."""


def cut(value: object, most: int = VALUE) -> str:
    """A value as a message shows it: what cannot be printed is escaped, and of a long one the middle is left out."""
    shown = _middle_out(str(value), most)
    escaped = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in shown)
    return _middle_out("".join(escaped), most)


def _middle_out(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 2]} … {text[-(most // 2) + 1 :]}"


class FopeError(Exception):
    """One message that says where, what was expected and what came; `hint` is the next step. Neither is ever long, or
    holds what a terminal would obey.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(cut(message, MESSAGE))
        self.hint = cut(hint, HINT)


class DocumentError(FopeError):
    """A file from outside that is not the document it should be."""


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


def missing(module: str, extra: str) -> BackendError:
    """That a `module` is not installed, and which extra brings it."""
    return BackendError(f"{module} is not installed", hint=f"pip install 'fope-export[{extra}]'")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional `module`, or say which extra brings it.

    Raises BackendError when it is missing or when it is installed but fails to load.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as cause:
        if cause.name != module.partition(".")[0]:
            raise BackendError(f"{module} is installed but broken: {cause}", hint=f"Reinstall {module}.") from cause
        raise missing(module, extra) from cause
    except (ImportError, OSError) as cause:
        raise BackendError(f"{module} is installed but does not load: {cause}", hint=f"Reinstall {module}.") from cause
