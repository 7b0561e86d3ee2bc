"""Failures a user can act on, and the door to optional libraries."""

import importlib
import json
from importlib.metadata import distributions
from types import ModuleType
from urllib.parse import unquote, urlsplit

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
    """What all errors of this package are: who catches it catches everything that a user can act on.

    `message` says where, what was expected and what came, in at most MESSAGE characters; `hint` says what to do next,
    in at most HINT. Neither holds what a terminal would obey.

    >>> import fope_export as fx
    >>> try:
    ...     fx.Bundle.open("nowhere")
    ... except fx.FopeError as error:
    ...     print(f"{error}. {error.hint}")
    nowhere is not a bundle: it has no fope_export.json. Make one with `fope-export export CKPT OUT`.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(cut(message, MESSAGE))
        self.hint = cut(hint, HINT)


class DocumentError(FopeError):
    """A file from outside that is not the document it should be: not there, not JSON, too long, of other fields.

    >>> from pathlib import Path
    >>> from fope_export.documents import read_json
    >>> size = Path("broken.json").write_text("[1, 2")
    >>> read_json(Path("broken.json"))
    Traceback (most recent call last):
    ...
    fope_export.errors.DocumentError: broken.json...
    """


class ConfigError(FopeError):
    """A configuration that no model, export, engine or request can have: a value that is not allowed, alone or beside
    the others.

    >>> import fope_export as fx
    >>> fx.ExportConfig(cache="static", opset=23)
    Traceback (most recent call last):
    ...
    fope_export.errors.ConfigError: a static cache needs opset 24, not 23
    """


class CheckpointError(FopeError):
    """A checkpoint that cannot be read, or that contradicts itself.

    >>> import fope_export as fx
    >>> fx.load_checkpoint("nowhere")
    Traceback (most recent call last):
    ...
    fope_export.errors.CheckpointError: nowhere does not exist; a checkpoint is a folder
    """


class ExportError(FopeError):
    """A model that cannot be written as ONNX.

    >>> import fope_export as fx, torch
    >>> fx.export_module(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), "linear")
    Traceback (most recent call last):
    ...
    fope_export.errors.ExportError: Linear has no FopeRotary inside
    """


class BundleError(FopeError):
    """A folder that is not, or no longer, the bundle that its manifest describes.

    >>> import fope_export as fx
    >>> fx.Bundle.open("checkpoint")
    Traceback (most recent call last):
    ...
    fope_export.errors.BundleError: checkpoint is not a bundle: it has no fope_export.json
    """


class BackendError(FopeError):
    """A backend that cannot run here, or a request that it cannot serve; also a package that is not installed.

    >>> import fope_export as fx
    >>> fx.load_backend("out", "abacus")
    Traceback (most recent call last):
    ...
    fope_export.errors.BackendError: there is no backend 'abacus'
    """


class BusyError(BackendError):
    """An engine whose queue is full: the request was not taken.

    >>> import fope_export as fx
    >>> engine = fx.Engine(fx.load_backend("out"), slots=1, queue=1)
    >>> for token in (100, 101, 102):
    ...     handle = engine.submit(fx.Request(prompt=[token]))
    Traceback (most recent call last):
    ...
    fope_export.errors.BusyError: 2 requests would wait, and 1 may
    """


class ParityError(FopeError):
    """A comparison that could not be made. (One that was made and failed is a result, not an error.)

    >>> import fope_export as fx
    >>> fx.validate("out", backend="torch")
    Traceback (most recent call last):
    ...
    fope_export.errors.ParityError: PyTorch is the yardstick; it proves nothing about itself
    """


def missing(module: str, extra: str) -> BackendError:
    """That a `module` is not installed, and which extra brings it."""
    return BackendError(f"{module} is not installed", hint=install(extra))


def install(extra: str, *, upgrade: bool = False) -> str:
    """The command that adds an extra, from where this package was installed (PEP 610), as it is on no index."""
    pip = "pip install -U" if upgrade else "pip install"
    written = (found for each in distributions(name="fope-export") if (found := each.read_text("direct_url.json")))
    origin = json.loads(next(written, "{}"))
    url = origin.get("url", "")
    if vcs := origin.get("vcs_info"):
        return f"{pip} 'fope-export[{extra}] @ {vcs['vcs']}+{url}@{vcs['commit_id']}'"
    if (folder := origin.get("dir_info")) is not None:
        editable = " -e" if folder.get("editable") else ""
        return f"{pip}{editable} '{unquote(urlsplit(url).path)}[{extra}]'"
    if url:
        return f"{pip} 'fope-export[{extra}] @ {url}'"
    return f"{pip} 'fope-export[{extra}]'"


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
