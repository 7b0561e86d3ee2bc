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

TYPES: dict[type, int] = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def model_of_one_call(spectrum: Spectrum, heads: int, kv_heads: int, dtype: type = np.float32) -> onnx.ModelProto:
    c = spectrum.config
    attributes = contract.attributes(
        contract.settings(c), dtype=TYPES[dtype], head_dim=c.head_dim, heads=heads, kv_heads=kv_heads, groups=c.groups
    )
    inputs, outputs = ([port.name for port in ports] for ports in (contract.INPUTS, contract.OUTPUTS))
    told: dict[str, Any] = attributes | contract.DISPATCH
    node = helper.make_node(contract.NAME, inputs, outputs, domain=contract.DOMAIN, **told)
    sizes: list[list[str | int]] = [["B", "S", heads, c.head_dim], ["B", "S", kv_heads, c.head_dim], ["B", "S"]]
    q, k, tokens = sizes
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("q", TYPES[dtype], q), ("k", TYPES[dtype], k), ("position_ids", TensorProto.INT64, tokens),
            ("q_rotated", TYPES[dtype], q), ("k_rotated", TYPES[dtype], k),
        )
    ]  # fmt: skip
    numbers = [numpy_helper.from_array(getattr(spectrum, name), name) for name in ("freq", "sin_coef", "cos_coef")]
    graph = helper.make_graph([node], "one", values[:3], values[3:], numbers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    body = ir.serde.serialize_function(function(23))
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, dict(zip(("q", "k", "position_ids"), inputs, strict=True)))
    return results
