"""The ONNX function: its body in ONNX Runtime against the definition, and its ports against the contract."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fope_export.fope import contract, reference
from fope_export.fope.spectrum import Spectrum
from fope_export.graph.translation import function, schema
from tests.fope.rotations import ALL, GENERAL, SHAPES, make
from tests.graph.one_call import model_of_one_call, run
from tests.support import EPS, rotated_within


@pytest.mark.parametrize(("shape", "fields"), ALL, ids=str)
def test_the_body_is_the_definition(shape: tuple[int, ...], fields: dict[str, Any]) -> None:
    spectrum, *inputs = make(shape, **fields)
    arrays = [tensor.numpy() for tensor in inputs]
    for got, x in zip(run(model_of_one_call(spectrum, shape[0], shape[1]), *arrays), arrays[:2], strict=True):
        wanted = reference.rotate(spectrum, x, arrays[2])
        rotated_within(got, wanted, spectrum, x, arrays[2], series=EPS, result=EPS)


@pytest.mark.parametrize(("shape", "fields", "whole"), GENERAL, ids=str)
def test_the_general_body_is_the_definition(shape: tuple[int, ...], fields: dict[str, Any], whole: bool) -> None:
    spectrum, *inputs = make(shape, whole=whole, **fields)
    arrays = [tensor.numpy() for tensor in inputs]
    model = model_of_one_call(spectrum, shape[0], shape[1], position=np.int64 if whole else np.float32)
    for got, x in zip(run(model, *arrays), arrays[:2], strict=True):
        rotated_within(got, reference.rotate(spectrum, x, arrays[2]), spectrum, x, arrays[2], series=EPS, result=EPS)


@pytest.mark.parametrize(("shape", "fields"), ALL[::3], ids=str)
def test_the_general_version_of_a_plain_call_is_the_plain_one(shape: tuple[int, ...], fields: dict[str, Any]) -> None:
    """Zeros are added to sums that are in another order, if the sums are in another order at all."""
    spectrum, *inputs = make(shape, **fields)
    arrays = [tensor.numpy() for tensor in inputs]
    plain, general = (
        run(model_of_one_call(spectrum, shape[0], shape[1], version=version), *arrays) for version in contract.VERSIONS
    )
    for got, wanted, x in zip(general, plain, arrays[:2], strict=True):
        rotated_within(got, wanted.astype(np.float64), spectrum, x, arrays[2], series=EPS, result=EPS)


@pytest.mark.parametrize("full_precision", [True, False])
def test_half_precision_goes_in_and_comes_out(full_precision: bool) -> None:
    spectrum, q, k, positions = make(SHAPES[1], full_precision=full_precision)
    arrays = [q.half().numpy(), k.half().numpy(), positions.numpy()]
    for got, x in zip(run(model_of_one_call(spectrum, 4, 2, np.float16), *arrays), arrays[:2], strict=True):
        wanted = reference.rotate(spectrum, x, arrays[2])
        assert got.dtype == np.float16
        half = float(np.finfo(np.float16).eps)  # of tables, products and sums too, where all is in half precision
        rotated_within(got, wanted, spectrum, x, arrays[2], series=EPS, result=half if full_precision else 3 * half)


def test_no_position_embedding_is_no_special_case() -> None:
    x, positions = np.random.default_rng(0).standard_normal((1, 3, 2, 8), np.float32), np.array([[0, 5, 99]])
    for got in run(model_of_one_call(Spectrum.nope(8), 2, 2), x, x, positions):
        np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("version", contract.VERSIONS)
def test_constant_paddings_are_whole_tensors(version: int) -> None:
    """ONNX Runtime before 1.25 sees no shape in a function's lists of integers, and Pad asks for one."""
    body = function(23, version)
    made = {node.outputs[0].name: node for node in body if node.op_type == "Constant"}
    pads = [node.inputs[1] for node in body if node.op_type == "Pad"]
    paddings = {value.name for value in pads if value is not None} & set(made)
    assert paddings and all("value" in made[name].attributes for name in paddings)


@pytest.mark.parametrize("version", contract.VERSIONS)
def test_schema_and_body_have_the_contracts_ports_and_attributes(version: int) -> None:
    described, body = schema(version), ir.serde.serialize_function(function(24, version))
    wanted = [[port.name for port in ports] for ports in (contract.INPUTS[version], contract.OUTPUTS)]
    assert described.since_version == version
    assert [[p.name for p in described.inputs], [p.name for p in described.outputs]] == wanted
    assert [list(body.input), list(body.output)] == wanted
    assert (
        set(body.attribute) == set(described.attributes) == set(contract.ATTRIBUTES) | set(contract.DISPATCH[version])
    )
    assert (body.domain, body.name) == (described.domain, described.name) == (contract.DOMAIN, contract.NAME)
    kinds = {"int64": "tensor(int64)", "float32": "tensor(float)", "T": "T", "P": "P"}
    assert [p.type_str for p in described.inputs] == [kinds[port.dtype] for port in contract.INPUTS[version]]
    assert [(o.domain, o.version) for o in body.opset_import] == [("", 24)]


def test_it_is_named_like_no_operator_of_onnx() -> None:
    assert contract.NAME not in {s.name for s in onnx.defs.get_all_schemas()}
