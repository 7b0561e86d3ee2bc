"""A graph of one call of the rotation's function, in ONNX Runtime."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fope_export.fope import contract
from fope_export.fope.spectrum import Spectrum
from fope_export.graph.translation import function

TYPES: dict[type, int] = {
    np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int64: TensorProto.INT64,
}  # fmt: skip


def model_of_one_call(
    spectrum: Spectrum, heads: int, kv_heads: int, dtype: type = np.float32, *, position: type = np.int64,
    version: int = 0,
) -> onnx.ModelProto:  # fmt: skip
    """Of the `version` that the spectrum and positions of this type need, where none is given."""
    c = spectrum.config
    general = c.axes > 1 or c.bases > 1 or position is not np.int64
    version = version or (contract.GENERAL if general else contract.PLAIN)
    attributes = contract.attributes(
        contract.settings(c), dtype=TYPES[dtype], head_dim=c.head_dim, heads=heads, kv_heads=kv_heads, groups=c.groups
    )
    inputs, outputs = ([port.name for port in ports] for ports in (contract.INPUTS[version], contract.OUTPUTS))
    told: dict[str, Any] = attributes | contract.DISPATCH[version]
    node = helper.make_node(contract.NAME, inputs, outputs, domain=contract.DOMAIN, **told)
    tokens: list[str | int] = ["B", "S"]
    q, k = ([*tokens, count, c.head_dim] for count in (heads, kv_heads))
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("q", TYPES[dtype], q), ("k", TYPES[dtype], k),
            ("position_ids", TYPES[position], tokens if version == contract.PLAIN else [c.axes, *tokens]),
            ("q_rotated", TYPES[dtype], q), ("k_rotated", TYPES[dtype], k),
        )
    ]  # fmt: skip
    numbers = {port.name: getattr(spectrum, port.name) for port in contract.NUMBERS}
    numbers[contract.AXIS.name] = np.array(c.axis or [0] * c.frequencies, np.int64)
    tensors = [numpy_helper.from_array(numbers[name], name) for name in inputs[3:]]
    graph = helper.make_graph([node], "one", values[:3], values[3:], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(contract.DOMAIN, version)]
    body = ir.serde.serialize_function(function(23, version))
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, q: np.ndarray, k: np.ndarray, position_ids: np.ndarray) -> list[np.ndarray]:
    """A token with one position stands there on every axis that the graph has."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    axes = session.get_inputs()[2].shape[:-2]
    positions = position_ids if position_ids.ndim > 2 else np.broadcast_to(position_ids, (*axes, *position_ids.shape))
    results: list[np.ndarray] = session.run(None, {"q": q, "k": k, "position_ids": np.ascontiguousarray(positions)})
    return results
