"""The tables of quantizations and dtypes: no other file knows a row, and a new row goes through every stage."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fope_export
from fope_export.backends.choose import BACKENDS
from fope_export.dtypes import DTYPES
from fope_export.quantizations import QUANTIZATIONS

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fope_export.__file__).parent
NAMES = [*QUANTIZATIONS, *DTYPES, *(name for name in BACKENDS if "-" in name)]
"""The other backends have names of packages."""
NAME = re.compile(rf"(?<![\w-])({'|'.join(sorted(NAMES, key=len, reverse=True))})(?![\w-])")
MAY = {
    "backends/choose.py": "a table",
    "dtypes.py": "a table",
    "quantizations.py": "a table",
    "manifest.py": "int8 is an element type of ONNX there, among all others",
    "parity/cases.py": "part of the rule, which was calibrated as it is",
}


def names_in(file: Path) -> set[str]:
    """Rows that a file's strings name, as whole words."""
    nodes = ast.walk(ast.parse(file.read_text()))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {name for text in texts for name in NAME.findall(text)}


def test_no_other_file_knows_a_row() -> None:
    known = {str(file.relative_to(PACKAGE)): names_in(file) for file in PACKAGE.rglob("*.py")}
    assert {file: names for file, names in known.items() if names and file not in MAY} == {}
    assert all(known[file] for file in MAY), "an exception that none needs any more"


def test_a_name_is_found_as_a_whole_word(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text('"""Of fp8-qdq."""\nx = f"--dtype {y} or bf16", "--int8-activations", "float8", "fp8"')
    assert names_in(file) == {"fp8-qdq", "bf16"}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_home_has_what_every_way_has(name: str) -> None:
    home = import_module(QUANTIZATIONS[name].home)
    assert all(callable(getattr(home, part)) for part in ("write", "read", "exact", "fast", "plain"))


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["quantization", "dtype", "backend"])
def test_a_new_row_goes_through_every_stage(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.toys", kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
