"""The programs in examples/ run, and print what they are for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fope_export.bundle import Bundle

EXAMPLES = Path(__file__).parent.parent / "examples"
PRINTED = {
    "score.py": r"(\S+: \d\.\d{3} nats a token\n){2}",
    "two_answers.py": r"(['\"].+['\"]\n){2}",
    "trained_module.py": r"loss 0\.\d{3}; the export computes the same\n",
}


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.py"))])
def test_an_example_runs(name: str, bundle: Bundle, rope_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("def main():\n    return 0\n")
    out = str(bundle.path)
    arguments = {
        "score.py": [out, str(rope_bundle.path), str(tmp_path / "text")],
        "two_answers.py": [out, "def main("],
        "trained_module.py": [str(tmp_path / "module")],
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments[name]], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTED[name], done.stdout), done.stdout
