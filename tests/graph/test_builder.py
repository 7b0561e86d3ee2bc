"""What passes write graphs with: names, places, constants that are made once."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from fope_export.graph.builder import MICROSOFT, GraphBuilder
from fope_export.graph.ways import array_of
from tests.graph.as_torch import torchs


def maker_of(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def builder_here() -> GraphBuilder:
    return GraphBuilder(torchs(), "here")


def test_the_builder_names_and_makes_once() -> None:
    builder = builder_here()
    (x,) = builder.graph.inputs
    first = builder.op("Sub", x, x)
    assert first.name == maker_of(first).name == "here/Sub" and builder.op("Sub", x, x) is first
    assert builder.within("there").op("Sub", x, x, name="left").name == "there/Sub.left"
    assert [value.name for value in builder.ops("Split", x, outputs=2, axis=0)] == ["here/Split.0", "here/Split.1"]
    changes: list[tuple[ir.Value, dict[str, Any]]] = [(first, {}), (x, {"to": 1})]
    for other, attributes in changes:
        with pytest.raises(ValueError, match="here/Sub is the name of two nodes"):
            builder.op("Sub", x, other, **attributes)
    assert builder.integers(1, 2) is builder.integers(1, 2) and array_of(builder.integer(3)) == 3
    with pytest.raises(ValueError, match=r"number\.3 is the name of two constants"):
        builder.constant("number.3", np.array(4))


def test_the_builder_knows_places_and_domains() -> None:
    builder = builder_here()
    (x,), (node,) = builder.graph.inputs, builder.graph
    builder.within("early", before=node).op("Abs", x, domain=MICROSOFT)
    builder.op("Exp", x)
    assert [each.op_type for each in builder.graph] == ["Abs", "Neg", "Exp"]
    assert builder.model.opset_imports[MICROSOFT] == 1


def test_the_builder_takes_out_what_only_these_read() -> None:
    builder = builder_here()
    (x,), (node,) = builder.graph.inputs, builder.graph
    kept = builder.op("Exp", x)
    last = builder.op("Add", builder.op("Abs", kept), kept)
    builder.op("Log", kept)
    builder.remove(maker_of(last))
    assert [each.op_type for each in builder.graph] == ["Neg", "Exp", "Log"]
    with pytest.raises(ValueError, match="still"):
        builder.remove(maker_of(kept))
    with pytest.raises(ValueError, match="output"):
        builder.remove(node)
