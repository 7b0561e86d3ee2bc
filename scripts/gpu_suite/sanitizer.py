"""compute-sanitizer around a program that launches small rotations and has no torch in it."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # the exit code that means findings
LIMIT = 120  # seconds for one tool
CLEAN = re.compile(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)")


def find(nvcc: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Beside nvcc, in the PATH, or where CUDA is usually installed."""
    homes = [Path(environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    folders = (nvcc.parent, nvcc.resolve().parent, *homes, Path("/usr/local/cuda/bin"))
    places = [folder / "compute-sanitizer" for folder in folders]
    places += [folder.parent / "compute-sanitizer" / "compute-sanitizer" for folder in folders]
    if command := shutil.which("compute-sanitizer", path=environ.get("PATH")):
        places.append(Path(command))
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def run(command: list[str], limit: int = LIMIT) -> tuple[int, str]:
    """Exit code and the end of the output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return -1, f"not finished after {limit} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-25:])


def verdict(code: int, output: str) -> str:
    """A tool that says nothing has not found nothing."""
    if code == 0 and CLEAN.search(output):
        return "clean"
    return "findings" if code == FOUND else "did not run"


def sanitize(program: Path, nvcc: Path) -> dict[str, Any]:
    """By tool: clean, findings, did not run, or absent; with the output where it is not clean."""
    code, output = run([str(program)])
    results: dict[str, Any] = {"program": {"verdict": "clean" if code == 0 else "findings", "output": output}}
    tool = find(nvcc)
    for name in TOOLS if code == 0 else ():
        if tool is None:
            results[name] = {"verdict": "absent"}
            continue
        told = run([str(tool), "--tool", name, "--error-exitcode", str(FOUND), str(program)])
        results[name] = {"verdict": verdict(*told)}
        if results[name]["verdict"] != "clean":
            results[name]["output"] = told[1]
    return results
