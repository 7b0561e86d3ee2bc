"""The checkpoint layouts, in the order in which a folder is held against them. A new dialect is a new row."""

from pathlib import Path

from fope_export.errors import CheckpointError
from fope_export.model.blueprint import Format
from fope_export.model.hugging_face import HUGGING_FACE
from fope_export.model.native import NATIVE
from fope_export.model.olmo import HF_OLMO, OLMO

FORMATS: tuple[Format, ...] = (NATIVE, OLMO, HF_OLMO, HUGGING_FACE)


def recognise(folder: Path) -> Format:
    """The layout of `folder`. Raises CheckpointError with the evidence that each layout would need."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {what}; a checkpoint is a folder", hint="Give the folder that holds the config."
        )
    for layout in FORMATS:
        if layout.recognise(folder):
            return layout
    known = "; ".join(f"{layout.name}: {layout.evidence}" for layout in FORMATS)
    raise CheckpointError(f"{folder}: no checkpoint layout recognised", hint=f"Looked for {known}.")
