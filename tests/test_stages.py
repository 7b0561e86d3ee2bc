"""What continuous integration is made of: stages that end, and skips that are failures."""

import subprocess
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest

from tests.conftest import NO_GPU, pytest_sessionfinish

STAGES = Path(__file__).parent.parent / ".ci" / "stages"


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [("true", 0, ""), ("bash -c 'exit 3'", 3, ""), ("sleep 60", 124, "stage it: not done in 0.005 minutes\n")],
)
def test_a_stage_says_what_it_took_and_fails_as_its_command_or_its_limit(command: str, code: int, told: str) -> None:
    script = f"source {STAGES}; stage 0.005 it {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, told)
    assert done.stdout.startswith("stage it: 0:0") and done.stdout.endswith(" of 0.005 minutes\n")


@pytest.mark.parametrize(
    ("allowed", "failed"), [(None, False), ("", True), ("cmake", False)], ids=["anything", "nothing", "cmake"]
)
def test_a_skip_for_want_of_a_part_is_a_failure(allowed: str | None, failed: bool) -> None:
    skipped = [Fake(longrepr=("", 0, f"Skipped: {reason}")) for reason in (NO_GPU, "cmake is missing")]
    reporter = Fake(stats={"skipped": skipped}, write_line=lambda text, **_: None)
    manager = Fake(get_plugin=lambda name: reporter)
    session: Any = Fake(config=Fake(getoption=lambda name: allowed, pluginmanager=manager), exitstatus=0)
    pytest_sessionfinish(session)
    assert (session.exitstatus == 1) == failed
