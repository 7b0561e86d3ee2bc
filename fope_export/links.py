"""ONNX files behind symbolic links, as in a hub's cache: libraries refuse weights that are links, of either kind."""

import os
import shutil
from functools import cache
from pathlib import Path

from fope_export.scratch import KEPT


def loadable(path: Path, *data: str) -> Path:
    """The ONNX file at `path`; where it or the files `data` beside it are links to files, a temporary copy of all of
    them. That lives as long as the process.
    """
    there = [name for name in (path.name, *data) if os.path.lexists(path.parent / name)]
    real = [(name, (path.parent / name).resolve()) for name in there]
    linked = any((path.parent / name).is_symlink() for name in there)
    if not linked or not all(file.is_file() for _, file in real):
        return path
    return _gathered(tuple((name, file, file.stat().st_mtime_ns) for name, file in real)) / path.name


@cache
def _gathered(files: tuple[tuple[str, Path, int], ...]) -> Path:
    folder = KEPT.folder()
    for name, file, _ in files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    return folder
