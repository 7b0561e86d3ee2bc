"""The cases: how they are fed, what is kept of them, and inputs that are saved and loaded."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fope_export.backends.base import feeds_for
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.errors import ParityError
from fope_export.parity.cases import (
    KEPT,
    KEPT_LOGITS,
    STEP_BYTES,
    Case,
    load_inputs,
    save_inputs,
    standard_cases,
)
from fope_export.parity.run import validate
from tests.support import Forgetful


def test_long_prefills_are_fed_in_chunks_that_fit(bundle: Bundle) -> None:
    large = msgspec.structs.replace(bundle.manifest.decoder(), vocab_size=200_000, training_length=512)
    cases = standard_cases(large)
    longest = next(case for case in cases if case.name == "prefill 8192")
    assert max(longest.steps) <= 671 and sum(longest.steps) == 8192
    assert all(case.kept * len(case.feeds.input_ids) * 200_000 <= 2 * KEPT_LOGITS for case in cases)
    wide = msgspec.structs.replace(large, vocab_size=256, training_length=65_536)
    longest = standard_cases(wide)[7]
    assert longest.kept == KEPT and max(longest.steps) * longest.length * 8 <= STEP_BYTES  # the mask


def test_inputs_are_replayed_by_us_and_by_polygraphy(bundle: Bundle, tmp_path: Path) -> None:
    cases = standard_cases(bundle.manifest.decoder(), seed=3, lengths=(5, 64))
    path = tmp_path / "inputs.json"
    save_inputs(path, bundle.manifest, cases)
    again = load_inputs(path, bundle.manifest.decoder())
    assert [case.length for case in again] == [case.length for case in cases]
    backend = load_backend(bundle)
    np.testing.assert_array_equal(again[1].run(backend), cases[1].run(backend))
    assert validate(bundle, load=path).passed
    polygraphy = Path(sys.executable).with_name("polygraphy")
    command: list[str | Path] = [polygraphy, "run", bundle.model, "--onnxrt", "--load-inputs", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


def inputs(ids: object = ((1, 2),), mask: object = ((1, 1),), positions: object = ((0, 1),)) -> str:
    return json.dumps([{"input_ids": ids, "attention_mask": mask, "position_ids": positions}])


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"a": 1}', '[{"input_ids": 3}]', inputs(3, 1, 0), inputs([[1, 256]]), inputs([[1, -1]]),
        inputs([[]], [[]], [[]]), inputs(mask=[[1, 0]]), inputs(mask=[[0, 0]]), inputs(mask=[[1, 1, 1]]), inputs("ab"),
    ],
)  # fmt: skip
def test_inputs_that_are_none_are_refused(content: str, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    path.write_text(content)
    with pytest.raises(ParityError) as caught:
        load_inputs(path, bundle.manifest.decoder())
    assert "--save-inputs" in caught.value.hint


def test_a_case_keeps_its_last_positions() -> None:
    counting = Forgetful(lambda feeds: feeds.position_ids[..., None].astype(float), 1)
    ids = np.zeros((1, 10), np.int64)
    for steps in ((10,), (3, 4, 3), (1,) * 10, (9, 1)):
        got = Case("case", feeds_for(ids), steps, 4).run(counting)
        assert got.ravel().tolist() == [6, 7, 8, 9]
