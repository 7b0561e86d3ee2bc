"""The fuzzer: the same seed gives the same inputs, what is not clean is told, and one input of every kind is clean."""

import random
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import fuzz_kinds
import fuzz_sources
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"

CLEAN = "error: x: expected y, found z\nhint:  w\n"


def trial(tmp_path: Path, *argv: str) -> fuzz.Trial:
    place = fuzz_sources.Place(tmp_path / "0", tmp_path)
    return fuzz.Trial(0, "kind", place, [*argv], 0, time.monotonic(), fuzz.listing(place))


@pytest.mark.parametrize(
    ("code", "said", "printed", "fault"),
    [
        (70, CLEAN, "", "exit code 70"),
        (-11, "", "", "exit code -11"),
        (1, "", "", "exit code 1"),
        (2, "Traceback (most recent call last):\nKeyError: 'x'\n" + CLEAN, "", "traceback: KeyError: 'x'"),
        (2, CLEAN + "x" * 2000, "", "a message of 20"),
        (2, CLEAN + CLEAN, "", "2 messages"),
        (2, "error: x\n", "", "no next step"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, int) else "",
)
def test_what_is_not_clean_is_told(code: int, said: str, printed: str, fault: str, tmp_path: Path) -> None:
    assert any(fault in told for told in fuzz.faults_of(trial(tmp_path, "validate"), code, said, printed))


def test_what_is_clean_is_not_told(tmp_path: Path) -> None:
    tried = trial(tmp_path, "validate")
    assert not fuzz.faults_of(tried, 2, CLEAN, "") and not fuzz.faults_of(tried, 0, "", "")
    assert not fuzz.faults_of(tried, 1, "", "FAILED")
    (tried.place.out).mkdir()
    (tried.place.out / "model.onnx").write_text("")
    assert not fuzz.changes(tried)
    (tried.place.root / "elsewhere").write_text("")
    assert fuzz.changes(tried) == ["elsewhere"]


def test_a_seed_says_what_is_tried(tmp_path: Path) -> None:
    """Two places get the same bytes, and the same command but for the place."""
    sources = tmp_path / "sources"
    (sources / "bundle").mkdir(parents=True)
    (sources / "bundle" / fuzz_sources.MANIFEST).write_text(
        '{"files": {}, "format_version": 1, "model": {"a": [1, "b"]}}'
    )
    tried = []
    for name in ("first", "second"):
        place = fuzz_sources.Place(tmp_path / name, sources)
        argv = fuzz_kinds.impossible(random.Random("1 3"), place)
        changed = (place.out / fuzz_sources.MANIFEST).read_text()
        tried.append(([part.replace(name, "") for part in argv], changed))
    assert tried[0] == tried[1]


@pytest.mark.whole
def test_one_input_of_every_kind_is_clean() -> None:
    count = len(fuzz_kinds.KINDS)
    command: list[str | Path] = [sys.executable, SCRIPTS / "fuzz.py", "--seed", "7", "--jobs", "1"]
    done = subprocess.run([*command, "--count", str(count)], capture_output=True, text=True)
    assert done.returncode == 0 and f"{count} inputs, 0 not clean" in done.stdout, done.stdout
    assert all(kind in done.stdout for kind in fuzz_kinds.KINDS)
