"""Records of engines that say what cannot be: refused by name, before a plan is looked at."""

import json
from typing import Any

import pytest

from fope_export.bundle import Bundle
from fope_export.errors import BackendError
from fope_export.tensorrt.record import newest_engine, records
from tests.tensorrt.an_engine import RECORD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profiles": {}}, "profiles missing"),
        ({"profiles": {"decode": {"batch": [1, 1, 4]}}}, "profiles decode: not those"),
        ({"profiles": {"decode": {"batch": [4, 1, 1], "total_sequence": [1, 8, 64]}}}, r"\[4, 1, 1\], expected min"),
        ({"decoder_layers": 0}, "profiles decode: not those"),
        ({"options": {"target": "x" * 5000}}, "expected tensorrt"),
        ({"plan_bytes": "many"}, "plan_bytes"),
        ({"more": 1}, "unknown field `more`"),
    ],
    ids=["no profiles", "half a profile", "upside down", "a module's", "target", "type", "unknown"],
)
def test_an_impossible_record_is_refused(change: dict[str, Any], message: str, spoilable: Bundle) -> None:
    bundle = spoilable.add({"engines/x.json": json.dumps(RECORD | change).encode()})
    with pytest.raises(BackendError, match=message) as caught:
        records(bundle)
    assert "engines/x.json" in str(caught.value) and caught.value.hint and len(str(caught.value)) < 1000


def test_a_possible_record_is_read(spoilable: Bundle) -> None:
    bundle = spoilable.add({"engines/x.json": json.dumps(RECORD).encode()})
    assert records(bundle)[0].max("total_sequence") == 64
    with pytest.raises(BackendError, match="built from another"):
        newest_engine(bundle)
    (bundle.path / "engines/x.json").unlink()
    (bundle.path / "engines/x.json").mkdir()
    with pytest.raises(BackendError, match="is a folder"):
        records(bundle)
