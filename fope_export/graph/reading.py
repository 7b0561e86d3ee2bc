"""ONNX files that `onnx_files` has let in, as the libraries have them."""

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from fope_export.errors import BundleError, cut
from fope_export.onnx_files import AGAIN, check_onnx


def read_onnx(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external weights. Raises BundleError as `check_onnx` does."""
    check_onnx(path)
    try:
        return onnx.load(path, "protobuf", load_external_data=False)  # whatever its name
    except (DecodeError, ValueError) as cause:
        raise BundleError(f"{path}: not a valid ONNX file: {cut(cause)}", hint=AGAIN) from cause


def load_onnx(path: Path) -> ir.Model:
    """The same as a graph to work on, its weights mapped from the disk. Raises BundleError as `check_onnx` does."""
    read_onnx(path)
    try:
        return ir.load(path)
    except (ValueError, TypeError, KeyError, AttributeError, ir.serde.SerdeError) as cause:
        raise BundleError(f"{path}: not a valid ONNX graph: {cut(cause)}", hint=AGAIN) from cause
