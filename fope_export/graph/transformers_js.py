"""The portable file where transformers.js looks for it, on the weights that the other graphs have."""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import Sequential

from fope_export.config import ExportConfig
from fope_export.graph.passes import NameDimensions
from fope_export.graph.reading import load_onnx
from fope_export.manifest import SIZES, TRANSFORMERS_JS, plain_file

ROWS = "batch_size"
"""It makes empty caches by the names of their sizes, and of any other name there are none."""


def for_transformers_js(folder: Path, export: ExportConfig) -> Path:
    """Write that file of the bundle in `folder`, whose portable file and weights are there; its path."""
    rows, *others = SIZES
    names = NameDimensions({rows: ROWS, **dict(zip(others, others, strict=True))})
    model = Sequential(names)(load_onnx(folder / plain_file(export))).model
    path = folder / TRANSFORMERS_JS
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                (folder / tensor.location).relative_to(path.parent).as_posix(), tensor.offset, tensor.length,
                tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "", base_dir=path.parent,
            )  # fmt: skip
    ir.save(model, path)
    return path
