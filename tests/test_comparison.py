"""Reports beside each other, and as Markdown."""

import json
from pathlib import Path

import pytest

from fope_export.cli import main
from fope_export.comparison import HINT, compare, markdown, read
from fope_export.errors import ConfigError
from tests.printed import held

PARITY = {"passed": False, "failures": ["case: prefill 1"], "backend": "onnxruntime", "cases": [
    {"name": "prefill 1", "ratios": {"rms": 12.5, "token": None}}, {"name": "prefill 2", "ratios": {"rms": None}},
]}  # fmt: skip
BENCH = {"cells": [
    {"contender": "torch", "length": 8, "batch": 1, "prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0},
    {"contender": "genai", "length": 8, "batch": 1, "refused": "not installed"},
]}  # fmt: skip
EVALUATION = {"models": [{"name": "fope", "losses": {"256": 1.5}, "passkey_accuracy": {"256": 0.5}}]}


def written(folder: Path, name: str, report: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(report))
    return folder / name


def test_two_of_a_kind_are_put_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(tmp_path / "a" / "reports", "bench.json", BENCH)
    faster = {"cells": [{**BENCH["cells"][0], "decode_tokens_per_s": 15.0}]}
    written(tmp_path / "b", "bench.json", faster)
    rows = {row.what: row for row in compare(read(tmp_path / "a"), read(tmp_path / "b"))}
    assert rows["torch, 1 x 8, decode /s"].ratio == 1.5 and rows["torch, 1 x 8, prefill /s"].ratio == 1
    assert rows["genai, 1 x 8, decode /s"].ratio is None
    assert main(["report", "compare", str(before), str(tmp_path / "b")]) == 0
    assert "1.5" in capsys.readouterr().out
    assert main(["report", "compare", str(before), str(tmp_path / "b"), "--json"]) == 0
    records = held("report-compare", capsys.readouterr().out)
    assert {"what": "torch, 1 x 8, decode /s", "before": 10, "after": 15, "ratio": 1.5} in records


@pytest.mark.parametrize(
    ("name", "report", "lines"),
    [
        ("parity.json", PARITY, ["### it: FAILED", "- case: prefill 1", "| prefill 1, error / rounding | 12.5 |"]),
        ("evaluation.json", EVALUATION, ["### it", "| fope, loss at 256 | 1.5 |", "| fope, passkeys at 256 | 0.5 |"]),
    ],
)
def test_one_is_told_in_markdown(name: str, report: object, lines: list[str], tmp_path: Path) -> None:
    told = markdown(read(written(tmp_path, name, report)), "it").splitlines()
    assert [line for line in lines if line not in told] == []


def test_what_is_no_report_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    bench, parity = written(tmp_path, "bench.json", BENCH), written(tmp_path / "p", "parity.json", PARITY)
    with pytest.raises(ConfigError, match="nothing in common"):
        compare(read(bench), read(parity))
    with pytest.raises(ConfigError, match="no report of this program: cases"):
        read(written(tmp_path, "other.json", {"cases": []}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no report") as caught:
        read(tmp_path / "empty")
    assert caught.value.hint == HINT
    assert main(["report", "compare", str(bench)]) == 2
