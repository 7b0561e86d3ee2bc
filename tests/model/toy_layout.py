"""A layout that the package does not know: files of other names, and every tensor's name in capitals."""

from pathlib import Path

from fope_export.config import ModelConfig, convert
from fope_export.model.layouts.base import Layout, WeightMap, read_json
from fope_export.model.layouts.native import stored_names

CONFIGURATION, WEIGHTS = "toy.json", "toy.safetensors"


def _read(folder: Path) -> WeightMap:
    path = folder / CONFIGURATION
    config = convert(read_json(path), ModelConfig, where=str(path))
    return WeightMap(config, {name: (name.upper(),) for name in stored_names(config)})


LAYOUT = Layout(
    evidence=CONFIGURATION,
    configuration=CONFIGURATION,
    weights=(WEIGHTS,),
    recognize=lambda folder: (folder / CONFIGURATION).exists(),
    read=_read,
)
