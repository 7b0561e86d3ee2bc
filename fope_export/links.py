"""ONNX files behind symbolic links, as in a hub's cache: libraries refuse weights that are links, of either kind."""

import shutil
from functools import cache
from pathlib import Path

from fope_export.scratch import KEPT


def loadable(path: Path, *data: str) -> Path:
    """The ONNX file at `path`; where it or the files `data` beside it are links, a temporary copy of all of them.
    That lives as long as the process.
    """
    if not any((path.parent / name).is_symlink() for name in (path.name, *data)):
        return path
    real = tuple((name, (path.parent / name).resolve()) for name in (path.name, *data))
    return _gathered(tuple((name, file, file.stat().st_mtime_ns) for name, file in real if file.is_file())) / path.name


@cache
def _gathered(files: tuple[tuple[str, Path, int], ...]) -> Path:
    folder = KEPT.folder()
    for name, file, _ in files:
        shutil.copyfile(file, folder / name)
    return folder
