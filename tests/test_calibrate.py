"""The calibration of the parity rule: a run on a tiny model, taken up again, and a summary that hides no alarm."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import calibrate_parity
import numpy as np
import pytest
import torch
from calibrate import models, places, power, records, runs, summary, today
from calibrate.faults import FAULTS

from fope_export import parity
from fope_export.parity.run import validate

TINY = models.Recipe(
    "count 0", layers=1, heads=2, kv_heads=1, head_dim=16, ff=32, vocabulary=256, length=32, spread=0.02, steps=2,
    groups=1, pairing="half", extras=False, tied=False, seed=0,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One model in float32 with one seed, for all stages."""
    threads = torch.get_num_threads()
    for module in (runs, power, places):
        monkeypatch.setattr(module, "pool", lambda role: (TINY,))
    monkeypatch.setattr(runs, "PASSES", ((("float32", 0),),))
    monkeypatch.setattr(runs, "SEEDS", (range(1),))
    for module, chosen in ((power, ("count 0", "float32", "optimized")), (places, "count 0")):
        monkeypatch.setattr(module, "MODELS", (chosen,))
        monkeypatch.setattr(module, "SEEDS", 1)
    wanted = ("a row of lm_head", "positions +1 in one decoding step")
    monkeypatch.setattr(power, "FAULTS", [fault for fault in FAULTS if fault.name in wanted])
    yield monkeypatch
    torch.set_num_threads(threads)


@pytest.mark.whole
def test_it_goes_on_where_it_stopped(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.jsonl"
    asked: list[tuple[str, str, int]] = []
    where = ["--out", str(out), "--work", str(tmp_path / "work")]
    real = runs.run

    def counted(run: runs.Run, work: Path) -> Iterator[records.Record]:
        asked.append(run.key)
        return real(run, work)

    tiny.setattr(runs, "run", counted)
    calibrate_parity.main(["--count", "--seconds", "0", *where])
    assert not asked and not out.exists()
    calibrate_parity.main(["--count", *where])
    out.write_bytes(out.read_bytes() + b'{"sitting": "cut')
    tiny.setattr(runs, "SEEDS", (range(2),))
    calibrate_parity.main(["--count", *where])
    assert asked == [("count 0", "float32", 0), ("count 0", "float32", 1)]
    calibrate_parity.main(["--power", "--places", *where])
    calibrate_parity.main(["--count", "--power", "--places", "--summary", *where])
    assert len(asked) == 2
    lines = list(records.of_rule(out, records.rule()))
    judged = [line for line in lines if "ratios" in line]
    assert [line["file"] for line in judged] == [*runs.FILES] * 2
    assert all(not line["failed"] and 0 < line["ratios"]["rms"] < 2.5 for line in judged)
    plain = validate(tmp_path / "work/count 0, float32", seed=0)
    for which, columns, recorded in zip(("", ", optimized"), plain.columns, judged, strict=False):
        same = [case.verdict for case in plain.cases if case.name.endswith("optimized") == bool(which)]
        wanted = {name: max(verdict.ratios[name] for verdict in same) for name in same[0].ratios}
        assert recorded["ratios"] == pytest.approx(wanted | {"column": columns.verdict.ratio}, rel=6e-3)
    tried = [line for line in lines if "power" in line]
    assert len(tried) == 2 and all(1e-8 < line["least"] < 0.1 and line["raised"] >= line["former"] for line in tried)
    (place,) = (line for line in lines if "place" in line)
    assert place["sound"] == "none" and place["clear"] == "right"
    assert row(capsys.readouterr().out, "all")[:4] == ["all", "4", "1", "0"]


def line(
    model: str, *failed: str, missed: tuple[str, ...] = (), former: float = 0.5, rms: float = 1.0
) -> dict[str, Any]:
    ratios = {"rms": rms, "token": 3.0, "logit": 2.0, "largest": 1.0, "column": 1.0}
    return {
        "role": "count", "run": [model, "float32", 0, 1], "file": "portable", "instructions": "AVX2", "ratios": ratios,
        "failed": [*failed], "missed": [*missed], "members": 8, "former": {"max_abs": former, "relative": 0.1},
    }  # fmt: skip


def row(text: str, start: str) -> list[str]:
    return next(each for each in text.splitlines() if each.startswith(start)).split()


def test_the_summary_counts_an_alarm() -> None:
    lines = [line(f"count {i % 60}") for i in range(120)]
    assert row(summary.tables(lines), "all")[:6] == ["all", "120", "60", "0", "0", "4.9%"]
    lines += [line("count 7", "prefill 7: token", former=1.5, rms=2.0), line("count 8", missed=("positions",))]
    told = summary.tables(lines)
    assert row(told, "all") == ["all", "122", "60", "1", "1", "7.7%", "of", "models", "1", "1"]
    assert "count 7, float32, 0, portable: prefill 7: token" in told
    assert "count 8, float32, 0, portable: not refused: positions" in told
    assert row(told, "count  float32")[4] == "0.80"
    assert power.raises(lines) == {"max_abs": 1.5, "relative": 1.0}


def test_the_bound_is_over_models() -> None:
    assert summary.upper_bound(0, 60) == pytest.approx(1 - 0.05 ** (1 / 60), abs=1e-5)
    assert summary.upper_bound(60, 60) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("strengths", "wanted"), [([1.0] * 19 + [5.0], 1.0), ([1.0] * 18 + [5.0, None], 5.0), ([None], None)]
)
def test_a_fault_is_seen_when_19_of_20_seeds_are_refused(strengths: list[float | None], wanted: float | None) -> None:
    assert summary.quantile(strengths) == wanted


def test_other_words_are_the_same_rule_and_other_numbers_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(parity.__file__).parent
    for name in records.RULE:
        (tmp_path / name).write_text((folder / name).read_text())
    monkeypatch.setattr(parity, "__file__", str(tmp_path / "__init__.py"))
    before, judge = records.rule(), tmp_path / records.RULE[0]
    judge.write_text(judge.read_text().replace('"""How many times', '"""So many times') + "\n# a remark\n")
    assert records.rule() == before
    judge.write_text(judge.read_text().replace("CLEAR = 10.0", "CLEAR = 11.0"))
    assert records.rule() != before


def test_records_of_another_rule_do_not_count(tmp_path: Path) -> None:
    book = records.Book(tmp_path / "result.jsonl")
    book.add({"role": "count"})
    other = json.dumps({"sitting": "other", "rule": "another", "machine": {"instructions": ""}})
    with book.path.open("a") as file:
        file.write(other + "\n" + json.dumps({"sitting": "other", "role": "count"}) + "\n")
    assert [each["sitting"] != "other" for each in book.records()] == [True]
    assert records.last_rule(book.path) == "another"


def test_the_former_rule_allows_three_times_pytorchs_error() -> None:
    rng = np.random.default_rng(0)
    truth, error = rng.standard_normal((64, 32)), 1e-3 * rng.standard_normal((64, 32))
    shares = today.shares(truth, truth + error, truth + 3 * error)
    assert all(shares[name] == pytest.approx(1, rel=1e-2) for name in ("max_abs", "relative", "cosine", "kl"))
    raised = today.shares(truth, truth + error, truth + 6 * error)
    assert raised["kl"] == pytest.approx(2, rel=2e-2)


def test_the_models_of_the_two_roles_are_others_and_many() -> None:
    fit, count = (set(models.pool(role)) for role in ("fit", "count"))
    assert not fit & count and len(count) >= 60
    drawn = [each for each in count if isinstance(each, models.Recipe)]
    assert {1, 12} <= {each.layers for each in drawn} and {1, 16} <= {each.heads for each in drawn}
    assert {32, 1024} <= {each.width for each in drawn} and {True, False} == {each.steps > 0 for each in drawn}
    kinds = {run.kind for run in runs.planned("count")}
    assert kinds == {*models.KINDS} and {run.threads for run in runs.planned("count")} == {1, 2}
    assert 2 * len(runs.planned("count")) >= 2000
