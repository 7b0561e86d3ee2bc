"""The checkpoints that come along, wherever this package is installed."""

import shutil
from importlib.resources import files
from pathlib import Path

from fope_export.errors import ConfigError
from fope_export.scratch import scratch

NAMES = {"fope": "FoPE", "rope": "RoPE"}
PASSKEY_NAMES = {"fope-passkey": "FoPE", "rope-passkey": "RoPE"}
"""Of the pair that was trained to find passkeys."""


def shipped(name: str) -> Path:
    """The folder of a shipped checkpoint: one of NAMES, or of PASSKEY_NAMES."""
    return Path(str(files("fope_export") / "data" / name))


def copy_shipped(name: str, out: Path) -> Path:
    """Copy the shipped checkpoint `name` to the new folder `out`, whole or not at all.

    Raises ConfigError for another name and where `out` is there, OSError where nothing can be written.
    """
    if name not in (names := NAMES | PASSKEY_NAMES):
        raise ConfigError(f"no model {name!r} comes along", hint=f"One of: {', '.join(names)}.")
    if out.exists():
        raise ConfigError(f"{out} is there already", hint="Name a folder that is not: nothing is overwritten.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch(out.parent) as temporary:
        shutil.copytree(shipped(name), temporary / name).rename(out)
    return out
