"""Bundles that are wrong in one place."""

from collections.abc import Callable

import numpy as np
import onnx

from fope_export.bundle import Bundle


def attributes(name: str, value: float, layer: int) -> Callable[[Bundle], None]:
    def spoil(bundle: Bundle) -> None:
        model = onnx.load(bundle.model, load_external_data=False)
        for node in model.graph.node:
            if node.name == f"layers.{layer}.attention.rotary/FopeRotary":
                next(a for a in node.attribute if a.name == name).f = value
        onnx.save(model, bundle.model)

    return spoil


def weights(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Bundle], None]:
    def spoil(bundle: Bundle) -> None:
        model = onnx.load(bundle.model)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))
        (bundle.path / "model.onnx.data").unlink()
        onnx.save(model, bundle.model, save_as_external_data=True, location="model.onnx.data")

    return spoil
