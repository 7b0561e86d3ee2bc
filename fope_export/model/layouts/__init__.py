"""The table of checkpoint layouts. A new one is a file that says what it is, and a row here.

Rows are names until a folder is held against them, so that the command line may list them and load nothing.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fope_export.errors import CheckpointError

if TYPE_CHECKING:
    from fope_export.model.layouts.base import Layout

ADAPTER = "adapter_config.json"
"""What PEFT's adapters have, in the place of a checkpoint's config.json."""
LAYOUTS = {
    "native": "fope_export.model.layouts.native",
    "olmo": "fope_export.model.layouts.olmo",
    "hf_olmo": "fope_export.model.layouts.hf_olmo",
    "hugging_face": "fope_export.model.layouts.hugging_face",
}
"""Name -> the module whose LAYOUT it is, in the order in which a folder is held against them."""


def layouts() -> Iterator[tuple[str, "Layout"]]:
    """Every layout with its name, loaded."""
    for name, module in LAYOUTS.items():
        yield name, import_module(module).LAYOUT


def recognize(folder: Path) -> tuple[str, "Layout"]:
    """The layout of `folder`, and its name. Raises CheckpointError with the evidence that each layout would need."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {what}; a checkpoint is a folder", hint="Give the folder that holds the config."
        )
    for name, layout in layouts():
        if layout.recognize(folder):
            return name, layout
    check_no_adapter(folder)
    known = "; ".join(f"{name}: {layout.evidence}" for name, layout in layouts())
    raise CheckpointError(f"{folder}: no checkpoint layout recognized", hint=f"Looked for {known}.")


def check_no_adapter(folder: Path) -> None:
    """Raises CheckpointError where what lies in the place of a checkpoint is an adapter."""
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: an adapter, and no checkpoint", hint="Export its base with it: export BASE OUT --adapter DIR."
        )
