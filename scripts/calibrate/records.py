"""The result file: one JSON object a line, only ever added to, so that a run cut short loses nothing.

A line that has `machine` begins a sitting; the others name theirs.
"""

import ast
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

import fope_export.parity

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "scripts/results/calibrate_parity.jsonl"
RULE = ("judge.py", "yardstick.py", "cases.py")
LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime")
Record = dict[str, Any]


def rule() -> str:
    """What the rule is: a hash of its files' code. Other words about it change nothing."""
    folder = Path(fope_export.parity.__file__).parent
    return hashlib.sha256("".join(_code(folder / name) for name in RULE).encode()).hexdigest()[:12]


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def machine() -> Record:
    """The processor, the instructions that PyTorch takes of it, and the libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }


class Book:
    """The records of one file that belong to the rule as it is, and a sitting that adds to them."""

    def __init__(self, path: Path) -> None:
        self.path, self.rule = path, rule()
        self.sitting = {"rule": self.rule, "commit": _commit(), "machine": machine()}
        self._named = False
        self._name = hashlib.sha256(json.dumps(self.sitting).encode()).hexdigest()[:8]

    def records(self) -> list[Record]:
        return list(of_rule(self.path, self.rule))

    def add(self, record: Mapping[str, Any]) -> None:
        """In one write, so that several processes may share the file."""
        lines = [] if self._begun() else [self.sitting]
        written = "".join(
            json.dumps({"sitting": self._name} | dict(line), separators=(",", ":")) + "\n" for line in (*lines, record)
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.write(b"\n" * _is_cut(file) + written.encode())

    def _begun(self) -> bool:
        """Whether the file names this sitting; from now on it does."""
        begun = self._named or any(line["sitting"] == self._name and "machine" in line for line in lines_of(self.path))
        self._named = True
        return begun


def _is_cut(file: BinaryIO) -> bool:
    """Whether the last line is half of one."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _commit() -> str:
    told = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip()


def lines_of(path: Path) -> Iterator[Record]:
    """Every whole line; a kill may leave half of one at the end."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def of_rule(path: Path, wanted: str) -> Iterator[Record]:
    """The records of all sittings with one rule, each with its sitting's instructions."""
    sittings = {line["sitting"]: line for line in lines_of(path) if "machine" in line}
    for line in lines_of(path):
        sitting = sittings.get(line["sitting"], {})
        if "machine" not in line and sitting.get("rule") == wanted:
            yield line | {"instructions": sitting["machine"]["instructions"]}


def last_rule(path: Path) -> str:
    """The rule that the newest sitting judged by."""
    return next((line["rule"] for line in reversed([*lines_of(path)]) if "machine" in line), "")
