"""What is known of ONNX's messages without ONNX, beside what ONNX says of them."""

import onnx
import pytest
from google.protobuf.descriptor import Descriptor

from fope_export.bundle import Bundle
from fope_export.onnx_files import BITS, EXTERNAL, MESSAGES, STRING, TENSORS, UNDEFINED, check_onnx

TYPES = onnx.TensorProto.DataType
SMALL = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
"""Element types that share bytes."""
NESTED = {"TensorTypeProto": "TypeProto.Tensor", "DimensionProto": "TensorShapeProto.Dimension"}
"""Messages that ONNX declares within others."""


def descriptor(name: str) -> Descriptor:
    outer, _, inner = NESTED.get(name, name).partition(".")
    message = getattr(onnx, outer).DESCRIPTOR
    return message.nested_types_by_name[inner] if inner else message


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_these_fields(name: str) -> None:
    known = descriptor(name).fields_by_name
    for field, number, kind in (each.split() for each in MESSAGES[name].split(", ")):
        theirs, one = known[field], kind.removeprefix("*")
        assert (theirs.number, theirs.is_repeated) == (int(number), kind != one)
        if one in MESSAGES:
            assert theirs.message_type is descriptor(one)
        else:
            names = {getattr(theirs, f"TYPE_{each}") for each in (one.upper(), "ENUM" if one == "int32" else "GROUP")}
            assert theirs.type in names


def test_element_types_have_their_sizes() -> None:
    sizes = {number: 8 * onnx.helper.tensor_dtype_to_np_dtype(number).itemsize for number in TYPES.values() if number}
    sizes |= {TYPES.Value(name): bits for name, bits in SMALL.items()}
    assert (
        sizes.pop(TYPES.Value("STRING")) and TYPES.Value("STRING") == STRING and TYPES.Value("UNDEFINED") == UNDEFINED
    )
    assert sizes == BITS


def test_numbers_of_places_and_attributes() -> None:
    assert onnx.TensorProto.EXTERNAL == EXTERNAL
    assert (onnx.AttributeProto.TENSOR, onnx.AttributeProto.TENSORS) == TENSORS


def test_a_graph_is_read_as_onnx_reads_it(bundle: Bundle) -> None:
    ours, theirs = check_onnx(bundle.model), onnx.load(bundle.model, load_external_data=False)
    assert [node.op_type for node in ours.graph.node] == [node.op_type for node in theirs.graph.node]
    assert [t.name for t in ours.graph.initializer] == [t.name for t in theirs.graph.initializer]
