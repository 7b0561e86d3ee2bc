"""A folder with which a server is started: a copy of the bundle, and files from `files/` that are filled in."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from fope_export import place
from fope_export.errors import BundleError, ConfigError, cut

FILES = Path(__file__).parent / "files"
SHARED = "shared"
"""What every folder gets."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a model may be called: part of paths, URLs and configurations."""


@dataclass(frozen=True)
class Target:
    """A server, and what its folder holds."""

    folders: tuple[str, ...]
    """Of FILES, whose contents are copied, after those of SHARED. In names and texts @@NAME stands for a value."""
    bundle: str = "bundle"
    """Where the bundle's copy lies."""
    values: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda common: {}
    """What its files need beside the common values, made of these."""


class _Blanks(Template):
    """Whose sign is none of a shell's, of YAML's or of Python's."""

    delimiter = "@@"


def fill(text: str, values: Mapping[str, str]) -> str:
    """A text with its blanks filled. Raises KeyError where there is no value for one."""
    return _Blanks(text).substitute(values)


def check_name(name: str) -> str:
    """Raises ConfigError for what is no name of a model."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"a model cannot be called {cut(name)!r} there: letters, digits, and . _ - after the first",
            hint="Give it another name with --served-model-name.",
        )
    return name


def shortest(value: float) -> float:
    """The shortest decimal that becomes a number in float32, in which servers hand it on: 0.7 is 0.7."""
    return float(str(np.float32(value)))


def write(
    target: Target, bundle: Path, out: Path, values: Mapping[str, str], files: Mapping[str, bytes], lock_timeout: float
) -> None:
    """Make `out`, whole or not at all, with `files` by name in it. Raises BundleError where it is not free, OSError
    where it cannot be written.
    """
    out = out.resolve()
    values = {**values, **target.values(values)}
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with place.preparing(out, lock_timeout, _settle) as work:
        check_free(out)
        for folder in (SHARED, *target.folders):
            _fill_in(FILES / folder, work, values)
        _copy(bundle, work / fill(target.bundle, values))
        for name, content in files.items():
            _made(work / fill(name, values)).write_bytes(content)
        place.put(work, out, _settle)


def check_free(out: Path) -> None:
    """Raises BundleError unless `out` is not there, or an empty folder."""
    present = [path.name for path in out.iterdir() if not path.name.startswith(place.OURS)] if out.is_dir() else ["."]
    if out.exists() and present:
        raise BundleError(
            f"{out} exists and would be lost; nothing was written", hint="Choose another folder, or remove it."
        )


def _fill_in(source: Path, work: Path, values: Mapping[str, str]) -> None:
    """Programs are made executable: a wheel's files need not be."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            made = _made(work / fill(str(path.relative_to(source)), values))
            made.write_text(text := fill(path.read_text(encoding="utf-8"), values), encoding="utf-8")
            if text.startswith("#!"):
                made.chmod(0o755)


def _copy(source: Path, to: Path) -> None:
    """All files of a folder, also those behind links, but for a writer's."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and not name.parts[0].startswith(place.OURS):
            shutil.copyfile(path, _made(to / name))


def _made(path: Path) -> Path:
    """The same, with its folder there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _settle(folder: Path) -> None:
    """`place.Settle` for folders in which nothing is replaced."""
    staged = folder / place.COMMITTED
    for path in staged.iterdir():
        path.rename(folder / path.name)
    place.flush_folder(folder)
    shutil.rmtree(staged, ignore_errors=True)
