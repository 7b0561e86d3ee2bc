"""The rotation in ONNX: its schema, its function body in standard operators, and how torch.onnx reaches them."""

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

import fope_export.fope.rotary
import fope_export.model.decoder  # noqa: F401 (both register torch operators)
from fope_export.dtypes import DTYPES
from fope_export.errors import ExportError
from fope_export.fope import contract

_FLOAT_TYPES = [f"tensor({row.element})" for row in DTYPES.values()]


def schema(version: int) -> OpSchema:
    """A version of `contract` as an ONNX operator schema."""

    def parameter(port: contract.Port) -> OpSchema.FormalParameter:
        names = {"int64": "tensor(int64)", "float32": "tensor(float)"}
        return OpSchema.FormalParameter(port.name, names.get(port.dtype, port.dtype))

    kinds = {float: OpSchema.AttrType.FLOAT, int: OpSchema.AttrType.INT, str: OpSchema.AttrType.STRING}
    attributes = contract.ATTRIBUTES | dict.fromkeys(contract.DISPATCH[version], str)
    positions = [("P", ["tensor(int64)", "tensor(float)"], "positions, whole or not")]
    return OpSchema(
        contract.NAME,
        contract.DOMAIN,
        version,
        inputs=[parameter(port) for port in contract.INPUTS[version]],
        outputs=[parameter(port) for port in contract.OUTPUTS],
        type_constraints=[("T", _FLOAT_TYPES, "the model's dtype"), *positions[: version - contract.PLAIN]],
        attributes=[OpSchema.Attribute(name, kinds[kind], required=True) for name, kind in attributes.items()],
    )


_CALLS = {version: Op(Opset(contract.DOMAIN, version), contract.NAME, schema(version)) for version in contract.VERSIONS}


def _translate(
    q: ir.Value, k: ir.Value, position_ids: ir.Value, freq: ir.Value, sin_coef: ir.Value, cos_coef: ir.Value,
    axis: ir.Value | None, *told: float,
) -> Any:  # fmt: skip
    """A general call where there is an axis; `passes.AttachRotary` makes one of others that need it."""
    if position_ids.dtype == ir.DataType.DOUBLE:
        raise ExportError("a rotation's positions are float64", hint="Give them as float32, or as int64.")
    attributes = contract.attributes(
        dict(zip(contract.SETTINGS, told, strict=True)),
        dtype=int(q.dtype or ir.DataType.FLOAT),
        head_dim=_size(q, 3), heads=_size(q, 2), kv_heads=_size(k, 2), groups=_size(sin_coef, 0),
    )  # fmt: skip
    version, more = (contract.PLAIN, ()) if axis is None else (contract.GENERAL, (axis,))
    numbers = freq, sin_coef, cos_coef, *more
    return _CALLS[version](q, k, position_ids, *numbers, **attributes, **contract.DISPATCH[version])


def _size(value: ir.Value, axis: int) -> int:
    """A size that is part of the architecture, and so known."""
    assert value.shape is not None
    dim = value.shape[axis]
    if not isinstance(dim, int):
        raise ExportError(
            f"a rotation's heads and channels must be fixed, and axis {axis} has the size {dim}",
            hint="Leave them out of dynamic_shapes.",
        )
    return dim


_SCATTER = Op(Opset("", 24), "TensorScatter", onnx.defs.get_schema("TensorScatter", 24))


def _translate_write(past: ir.Value, new: ir.Value, written: ir.Value) -> Any:
    return _SCATTER(past, new, written, axis=2, mode="linear")


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fope.rotary.default: _translate,
    torch.ops.fope.write.default: _translate_write,
}
"""For torch.onnx.export's `custom_translation_table`."""


_BODY = """
<domain: "fope", opset_import: ["" : {opset}]>
FopeRotary
<{attributes}>
({inputs}) => ({outputs})
{{
  # Sizes; runtimes fold them, and all that follows from coefficients alone, when they load the model.
  zero = Constant <value_ints: ints = [0]> ()
  one = Constant <value_ints: ints = [1]> ()
  two = Constant <value_ints: ints = [2]> ()
  last = Constant <value_ints: ints = [-1]> ()
  keep_rest = Constant <value_ints: ints = [0, -1]> ()
  zero_float = Constant <value_float: float = 0.0> ()
  one_float = Constant <value_float: float = 1.0> ()
  head_dim_scalar = Constant <value_int: int = @head_dim> ()
  head_dim = Reshape (head_dim_scalar, one)
  rotary_dim_scalar = Constant <value_int: int = @rotary_dim> ()
  rotary_dim = Reshape (rotary_dim_scalar, one)
  half = Div (rotary_dim, two)
  groups = Shape <start: int = 0, end: int = 1> (sin_coef)
  pairs = Shape <start: int = 2, end: int = 3> (sin_coef)
{both}
  # The coefficients [G, J, F] become [J + 1, G * R/2]; the added row holds the pads, for a basis that ends in 1.
  unturned = Sub (half, pairs)
  to_half = Concat <axis: int = 0> (zero, unturned)
  row_shape = Concat <axis: int = 0> (groups, one, pairs)
  row = Expand (zero_float, row_shape)
  sin_pad_value = Constant <value_float: float = @sin_pad> ()
  cos_pad_value = Constant <value_float: float = @cos_pad> ()
  sin_pad_row = Pad (row, to_half, sin_pad_value, last)
  cos_pad_row = Pad (row, to_half, cos_pad_value, last)
  sin_rows = Pad ({sin_coef}, to_half, zero_float, last)
  cos_rows = Pad ({cos_coef}, to_half, zero_float, last)
  sin_unsigned = Concat <axis: int = 1> (sin_rows, sin_pad_row)
  cos_weights_grouped = Concat <axis: int = 1> (cos_rows, cos_pad_row)
  sign_value = Constant <value_float: float = @sign> ()
  sin_weights_grouped = Mul (sin_unsigned, sign_value)
  sin_weights_by_row = Transpose <perm: ints = [1, 0, 2]> (sin_weights_grouped)
  cos_weights_by_row = Transpose <perm: ints = [1, 0, 2]> (cos_weights_grouped)
  sin_weights = Reshape (sin_weights_by_row, keep_rest)
  cos_weights = Reshape (cos_weights_by_row, keep_rest)

  # The basis [B, S, J + 1], the same in every layer: sines and cosines of exact float32 angles, then 1.
{positions}
  angles = Mul (positions_float, freq)
  sines = Sin (angles)
  cosines = Cos (angles)
  one_column = Constant <value: tensor = int64[2] {{0, 1}}> ()
{bases}

  # RotaryEmbedding shares one table between heads; with groups laid along the sequence, each has its own.
  table_shape = Concat <axis: int = 0> (keep_rest, half)
  sin_flat = MatMul (sin_basis, sin_weights)
  cos_flat = MatMul (cos_basis, cos_weights)
  sin_grouped = Reshape (sin_flat, table_shape)
  cos_grouped = Reshape (cos_flat, table_shape)
  sin = Cast <to: int = @compute_dtype> (sin_grouped)
  cos = Cast <to: int = @compute_dtype> (cos_grouped)
{turn_q}
{turn_k}
}}
"""
_TURN = """
  {x}_group_scalar = Constant <value_int: int = @{heads}> ()
  {x}_group = Reshape ({x}_group_scalar, one)
  {x}_width = Mul ({x}_group, head_dim)
  {x}_grouped_shape = Concat <axis: int = 0> (keep_rest, {x}_width)
  {x}_flat = Reshape ({x}, {x}_grouped_shape)
  {x}_grouped = Cast <to: int = @compute_dtype> ({x}_flat)
  {x}_turned = RotaryEmbedding
    <num_heads: int = @{heads}, interleaved: int = @interleaved, rotary_embedding_dim: int = @rotary_dim>
    ({x}_grouped, cos, sin)
  {x}_heads = Mul (groups, {x}_group)
  {x}_shape = Concat <axis: int = 0> (keep_rest, {x}_heads, head_dim)
  {x}_unflat = Reshape ({x}_turned, {x}_shape)
  {x}_rotated = CastLike ({x}_unflat, {x})
"""


_PARTS = {
    contract.PLAIN: {
        "both": "",
        "sin_coef": "sin_coef",
        "cos_coef": "cos_coef",
        "positions": """
  positions = Unsqueeze (position_ids, last)
  positions_float = Cast <to: int = 1> (positions)""",
        "bases": """
  sin_basis = Pad (sines, one_column, one_float, last)
  cos_basis = Pad (cosines, one_column, one_float, last)""",
    },
    contract.GENERAL: {
        "both": """
  # Coefficients over one basis are over both, and 0 over the other: of 2D rows the first are of sines.
  frequencies = Shape <start: int = 0, end: int = 1> (freq)
  rows = Shape <start: int = 1, end: int = 2> (sin_coef)
  all_rows = Mul (frequencies, two)
  missing = Sub (all_rows, rows)
  below = Concat <axis: int = 0> (zero, missing)
  above = Concat <axis: int = 0> (missing, zero)
  sin_both = Pad (sin_coef, below, zero_float, one)
  cos_both = Pad (cos_coef, above, zero_float, one)
""",
        "sin_coef": "sin_both",
        "cos_coef": "cos_both",
        "positions": """
  all_positions = Cast <to: int = 1> (position_ids)
  positions_by_frequency = Gather <axis: int = 0> (all_positions, axis)
  positions_float = Transpose <perm: ints = [1, 2, 0]> (positions_by_frequency)""",
        "bases": """
  waves = Concat <axis: int = -1> (sines, cosines)
  sin_basis = Pad (waves, one_column, one_float, last)
  cos_basis = Identity (sin_basis)""",
    },
}
"""What the versions do each in its own way."""


def function(opset: int, version: int) -> ir.Function:
    """A version of the rotation as a model-local function for a model of this `opset` (23 or later)."""
    turns = {
        f"turn_{x}": _TURN.format(x=x, heads=heads)
        for x, heads in (("q", "heads_per_group"), ("k", "kv_heads_per_group"))
    }
    header = {
        "attributes": ", ".join((*contract.ATTRIBUTES, *contract.DISPATCH[version])),
        "inputs": ", ".join(port.name for port in contract.INPUTS[version]),
        "outputs": ", ".join(port.name for port in contract.OUTPUTS),
    }
    text = _BODY.format(opset=opset, **header, **_PARTS[version], **turns)
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
