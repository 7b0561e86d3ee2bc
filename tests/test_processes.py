"""Children: none outlives its parent, whatever ends that, and none runs what lies in the current folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fope_export.processes import child, clean_path, environment, output, python
from fope_export.scratch import PREFIX, scratch, sweep

PARENT = """
import sys, time
from fope_export.processes import child
with child(["/bin/sh", "-c", "sleep 1000 & echo $! $$; wait"]) as running:
    time.sleep(1000)
"""


def lives(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_children_and_theirs_end_with_their_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )  # fmt: skip
    assert parent.stdout
    with parent, parent.stdout:
        family = list(map(int, parent.stdout.readline().split()))
        assert all(map(lives, family))
        parent.send_signal(number)
        parent.wait(60)
    deadline = time.monotonic() + 60
    while any(map(lives, family)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(lives, family))


def test_a_child_ends_with_its_block_and_tells_how() -> None:
    with child(["/bin/sleep", "1000"]) as running:
        pass
    assert running.returncode == -signal.SIGKILL
    assert output(["/bin/sh", "-c", "echo out; echo told >&2; exit 3"]).returncode == 3
    assert output(["/bin/sh", "-c", "kill -SEGV $$"]).returncode == -signal.SIGSEGV
    with pytest.raises(subprocess.TimeoutExpired):
        output(["/bin/sleep", "1000"], timeout=0.1)
    with pytest.raises(OSError, match="no program"):
        output(["/no/such/program"])


@pytest.mark.parametrize("path", ["", ":", "{here}:", ":{here}"], ids=["nothing", "empty", "before", "after"])
def test_nothing_of_the_current_folder_runs(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("open('EXECUTED', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path.format(here=tmp_path.parent))
    done = output(python("fope_export.tensorrt.worker"))
    assert not Path("EXECUTED").exists() and "msgspec.DecodeError: Input data was truncated" in done.stderr
    grandchild = output([sys.executable, "-c", "import sys; print(sys.path)"])
    assert f"'{tmp_path}'" not in grandchild.stdout and "''" not in grandchild.stdout
    inherited = os.environ | {"PYTHONPATH": path.format(here=tmp_path.parent)}
    command = [sys.executable, "-m", "fope_export.cli", "inspect", "nothing"]
    subprocess.run(command, env=inherited, capture_output=True)
    assert not Path("EXECUTED").exists()


def test_what_pythonpath_names_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", "/other"])
    clean_path()
    assert sys.path == [str(tmp_path), "/other"]
    assert environment()["PYTHONPATH"] == str(tmp_path)


def test_temporary_folders_of_dead_processes_are_swept(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / "others").mkdir()
    with scratch(tmp_path) as folder:
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, "others"}
    assert [path.name for path in tmp_path.iterdir()] == ["others"]
