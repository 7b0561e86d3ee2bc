"""What is built from this checkout, and an environment that the wheel is installed in; all is gone after the tests."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pages import ROOT
from tests.wheel.users import SETS, User


class Built(NamedTuple):
    """A copy of the tree as git has it, the sdist of that, and the wheel that was made from the sdist."""

    tree: Path
    sdist: Path
    wheel: Path


def build(tree: Path, out: Path, *options: str) -> None:
    """As packagers do."""
    command = [sys.executable, "-m", "build", *options, "--outdir", str(out), str(tree)]
    environ = os.environ | {"PIP_CONSTRAINT": str(SETS["usual"])}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """Built from a copy: what setuptools leaves in a tree would be in the next wheel too."""
    folder = tmp_path_factory.mktemp("built")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0")[:-1]:
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    build(folder / "tree", folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    yield Built(folder / "tree", sdist, wheel)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], User]]:
    """Makes users, of the versions of a set."""
    folder = tmp_path_factory.mktemp("users")
    yield lambda versions: User.create(folder / f"{len([*folder.iterdir()])}", versions)
    shutil.rmtree(folder)
