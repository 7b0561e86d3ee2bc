"""The lowest and the newest versions that users may have: with each set, which pins every version, the built
wheel exports, validates and runs.
"""

import re
from collections.abc import Callable

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.wheel.conftest import Built
from tests.wheel.users import SETS, User, from_wheel

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("versions", ["lowest", "newest"])
def test_a_set(versions: str, built: Built, user: Callable[[str], User]) -> None:
    given = user(versions)
    given.lend_torch()
    given.done(*from_wheel(built.wheel))
    asked = map(Requirement, re.sub(r"#.*", "", SETS[versions].read_text()).split())
    pinned: dict[str, str] = {canonicalize_name(each.name): str(each.specifier)[2:] for each in asked}
    found: dict[str, str] = {canonicalize_name(name): version for name, version in given.packages().items()}
    assert found.pop("fope-export") and found.pop("torch").startswith("2.13.0")
    assert found == pinned
    given.done("fope-export", "demo", "--copy", "fope", "checkpoint")
    given.follow("export", "validate", "run")
