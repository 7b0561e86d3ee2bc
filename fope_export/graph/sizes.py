"""The symbolic sizes of a traced module: what the user called them, and which values they may have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import sympy
from torch import Tensor
from torch.export import ExportedProgram

from fope_export.errors import ExportError
from fope_export.manifest import TERM, Extent

Axes = dict[str, dict[int, Any]]
"""By input and axis: a Dim, or what else torch.export takes there."""
UNBOUNDED = 2**31
DYNAMIC = "Give a dictionary by the names of forward's parameters: {'x': {0: Dim('batch'), 1: Dim('sequence')}}."


def axes_of(names: Sequence[str], dynamic_shapes: Any) -> Axes:
    """`dynamic_shapes` in one of its forms: for every input, a dictionary by axis.

    Raises ExportError where it does not match the inputs.
    """
    if dynamic_shapes is None:
        return {name: {} for name in names}
    if not isinstance(dynamic_shapes, Sequence | Mapping):
        raise ExportError(f"dynamic_shapes is a {type(dynamic_shapes).__name__}", hint=DYNAMIC)
    if isinstance(dynamic_shapes, Sequence) and len(dynamic_shapes) != len(names):
        raise ExportError(f"{len(dynamic_shapes)} dynamic_shapes for {len(names)} inputs", hint=DYNAMIC)
    given = dynamic_shapes if isinstance(dynamic_shapes, Mapping) else dict(zip(names, dynamic_shapes, strict=True))
    if unknown := sorted(given.keys() - set(names)):
        raise ExportError(f"dynamic_shapes names {unknown[0]}; the inputs are {', '.join(names)}", hint=DYNAMIC)
    shapes = {name: given.get(name) or {} for name in names}
    return {name: dict(s) if isinstance(s, Mapping) else dict(enumerate(s)) for name, s in shapes.items()}


def symbols_of(program: ExportedProgram, names: Sequence[str], axes: Axes) -> dict[str, str]:
    """torch's symbols with the names of their Dims, or <input>_<axis>; `names` are the graph's, in the axes' order."""
    symbols: dict[str, str] = {}
    for name, given, shape in zip(names, axes.values(), _traced(program), strict=True):
        for axis, size in enumerate(shape):
            free = sorted(map(str, getattr(size, "free_symbols", ())))
            dim = given.get(axis)
            named = getattr(getattr(dim, "root", dim), "__name__", None)
            if len(free) == 1 and named:
                symbols[free[0]] = named
            elif [str(size)] == free:
                symbols.setdefault(free[0], f"{name.replace('.', '_')}_{axis}")
    return symbols


def extents(program: ExportedProgram, example: Iterable[Tensor], symbols: Mapping[str, str]) -> dict[str, Extent]:
    """By name, the values that a size may have and the one it has in the example."""
    pairs = [
        (traced, size)
        for shape, tensor in zip(_traced(program), example, strict=True)
        for traced, size in zip(shape, tensor.shape, strict=True)
        if not isinstance(traced, int)
    ]
    solved = sympy.solve([traced - size for traced, size in pairs], dict=True)
    values = {str(symbol): int(value) for symbol, value in solved[0].items()} if solved else {}
    limits = {str(expression): limit for expression, limit in program.range_constraints.items()}
    ranges = {}
    for symbol, name in symbols.items():
        least, most = (_whole(getattr(limits.get(symbol), end, None)) for end in ("lower", "upper"))
        ranges[name] = Extent(max(least or 1, 1), values[symbol], most)
    return dict(sorted(ranges.items()))


def _whole(end: Any) -> int | None:
    """One end of a range; nothing where it is open."""
    return int(end) if getattr(end, "is_Integer", False) and int(end) < UNBOUNDED else None


def _traced(program: ExportedProgram) -> list[list[Any]]:
    """Of each input, its sizes: whole numbers, and sympy's expressions of torch's symbols."""
    nodes = {node.name: node for node in program.graph.nodes}
    shapes = [nodes[name].meta["val"].shape for name in program.graph_signature.user_inputs]
    return [[size if isinstance(size, int) else size.node.expr for size in shape] for shape in shapes]


def dimensions(model: ir.Model, symbols: Mapping[str, str]) -> dict[str, str]:
    """Every size in the shapes of the graph's inputs and outputs, with names in the place of torch's symbols.

    Raises ExportError for a size that does not follow from the inputs' sizes.
    """
    given = _named(model.graph.inputs, symbols)
    for name in given.values():
        if TERM.sub("", name).strip():
            raise ExportError(f"the size of an input is {name}, expected a sum of named sizes", hint=DYNAMIC)
    return dict(symbols) | given | _named(model.graph.outputs, symbols)


def _named(values: Iterable[ir.Value], symbols: Mapping[str, str]) -> dict[str, str]:
    expressions = {}
    for value in values:
        for size in {str(size.value) for size in value.shape or () if not isinstance(size, int)}:
            expression = sympy.sympify(size)
            if unknown := sorted({str(s) for s in expression.free_symbols} - symbols.keys()):
                raise ExportError(
                    f"{value.name} has the size {size}, and {unknown[0]} follows from no input's size",
                    hint="Sizes must not depend on values; give every input's axis that changes a Dim.",
                )
            names = {symbol: sympy.Symbol(symbols[str(symbol)]) for symbol in expression.free_symbols}
            expressions[size] = str(expression.subs(names))
    return expressions
