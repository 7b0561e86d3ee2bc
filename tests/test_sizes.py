"""Files and functions stay of a size that is read at one sitting."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for folder in ("fope_export", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
FILES += [path for kind in ("cpp", "cu", "cuh", "h") for path in (ROOT / "plugins").rglob(f"*.{kind}")]
FILE, FUNCTION, MEDIAN = 400, 60, 8
"""Lines at most; the median is that of the package's functions."""


def functions(path: Path) -> dict[str, int]:
    """Lines of every function of a Python file, by its place and name."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return {f"{path.name}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in nodes}


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in FILES}
    assert len(lengths) > 200 and {name: lines for name, lines in lengths.items() if lines > FILE} == {}


@pytest.mark.parametrize("folder", ["fope_export", "scripts", "tests"])
def test_no_function_is_long(folder: str) -> None:
    lengths = {name: n for path in (ROOT / folder).rglob("*.py") for name, n in functions(path).items()}
    assert lengths and {name: lines for name, lines in lengths.items() if lines > FUNCTION} == {}
    if folder == "fope_export":
        assert statistics.median(lengths.values()) <= MEDIAN
