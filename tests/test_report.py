"""The reports say what the result says, open offline, and hold nothing that a page could trip over."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import onnx
import pytest
from rich.console import Console

from fope_export.bundle import Bundle
from fope_export.demo import DemoResult, Shown, demo_record
from fope_export.parity.judge import LIMITS
from fope_export.parity.results import RATIOS, ParityResult
from fope_export.parity.run import validate
from fope_export.report import (
    LABELS,
    parity_junit,
    parity_page,
    parity_record,
    parity_table,
    place,
    write_parity,
    write_reports,
)
from tests.printed import held


@pytest.fixture(scope="module")
def passed(bundle: Bundle) -> ParityResult:
    return validate(bundle, lengths=(1, 64))


@pytest.fixture
def failed(spoilable: Bundle) -> tuple[Bundle, ParityResult]:
    model = onnx.load(spoilable.model, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "sin_pad":
                attribute.f = 0.0
    onnx.save(model, spoilable.model)
    return spoilable, validate(spoilable, lengths=(64,))


def test_all_three_join_the_bundle(spoilable: Bundle, passed: ParityResult) -> None:
    write_parity(spoilable, passed)
    reports = {f"reports/parity.{kind}" for kind in ("json", "html", "xml")}
    assert reports <= set(Bundle.open(spoilable.path).manifest.files)


def test_reports_go_elsewhere_and_what_cannot_be_written_is_told(
    bundle: Bundle, passed: ParityResult, tmp_path: Path
) -> None:
    out, junit = tmp_path / "new" / "reports", tmp_path / "ci" / "junit.xml"
    assert list(write_reports(bundle, passed, out, junit, lock_timeout=0)) == [out / "parity.html", junit]
    assert junit.read_bytes() == (out / "parity.xml").read_bytes()
    assert json.loads((out / "parity.json").read_bytes())["passed"] and Bundle.open(bundle.path) == bundle
    written = list(write_reports(bundle, passed, junit / "below", junit / "below", lock_timeout=0))
    assert all(isinstance(each, OSError) for each in written) and len(written) == 2


def test_the_json_holds_every_number(spoilable: Bundle, passed: ParityResult) -> None:
    write_parity(spoilable, passed)
    record = held("validate", (spoilable.path / "reports/parity.json").read_text())
    assert record["passed"] is True and record["rule"]["limits"] == LIMITS
    assert record["model_sha256"] == spoilable.manifest.files["model.onnx"]
    hashes = {name: spoilable.manifest.files[name] for name in ("model.onnx", "model.onnx.data")}
    assert record["tested"] == [{"backend": "onnxruntime", "variant": "portable", "files": hashes}]
    assert [case["name"] for case in record["cases"]] == [case.name for case in passed.cases]
    assert all(case["error"].keys() == case["pytorch_error"].keys() == LABELS.keys() for case in record["cases"])
    assert all(case["ratios"].keys() == case["limits"].keys() == RATIOS.keys() - {"column"} for case in record["cases"])
    assert record["columns"][0]["ratio"] <= record["columns"][0]["limit"] == LIMITS["column"]
    assert all(control["refused_by"] for control in record["controls"])


def test_junit_counts_failures_and_says_where(failed: tuple[Bundle, ParityResult]) -> None:
    bundle, result = failed
    write_parity(bundle, result)
    assert held("validate", (bundle.path / "reports/parity.json").read_text())["place"]
    suite = ElementTree.parse(bundle.path / "reports/parity.xml").getroot()
    took = [float(case.attrib["time"]) for case in suite.findall("testcase")]
    assert took[0] > 0 and 0 < sum(took) < float(suite.attrib["time"])
    failures = suite.findall("testcase/failure")
    assert int(suite.attrib["failures"]) == len(failures) >= 2
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    assert "times rounding" in failures[0].attrib["message"]
    assert "layers.0.attention.rotary" in (failures[0].text or "")


def test_what_the_demo_prints(bundle: Bundle, passed: ParityResult) -> None:
    shown = Shown("FoPE", bundle, passed, {"torch": {64: 1.5}, "onnxruntime": {64: 1.5}})
    record = demo_record(DemoResult((shown,), "text", Path("report.html")))
    assert held("demo", msgspec.json.encode(record))["models"]["FoPE"]["nats_per_byte"]["torch"] == {"64": 1.5}


NOT_XML = "\x00\x1b[31m \x0b \ud800 \udcff \ufffe"


def test_one_failure_among_cases_of_one_name_is_seen(passed: ParityResult, failed: tuple[Bundle, ParityResult]) -> None:
    wrong = next(case for case in failed[1].cases if not case.verdict.passed)
    for cases in (
        (wrong, replace(passed.cases[0], name=wrong.name)),
        (replace(passed.cases[0], name=wrong.name), wrong),
    ):
        result = replace(passed, cases=cases)
        assert not result.passed and [f"case: {wrong.name}: " in each for each in result.failures] == [True]


def test_any_text_can_be_written(failed: tuple[Bundle, ParityResult]) -> None:
    bundle, result = failed
    strange = replace(bundle, path=bundle.path / f"a\x01{NOT_XML}")
    told = replace(result, broken=f"it said {NOT_XML} é 😀\tx", cases=(replace(result.cases[0], name=NOT_XML),))
    suite = ElementTree.fromstring(parity_junit(strange, told))
    shown = r"\x00\x1b[31m \x0b \ud800 \udcff \ufffe"
    assert suite.get("name") == rf"parity a\x01{shown}"
    assert suite.findall("testcase")[0].get("name") == f"case: {shown}"
    told_by = suite.find("testcase[@name='backend']/failure")
    assert told_by is not None and told_by.get("message") == f"it said {shown} é 😀\tx"
    assert parity_page(strange, told).encode()
    assert "\\\\ud800" in json.dumps(parity_record(bundle, told)["broken"])


def test_the_page_opens_offline(bundle: Bundle, passed: ParityResult) -> None:
    page = parity_page(bundle, passed)
    loaded = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
    assert all(link.startswith("#") for link in loaded), loaded
    assert "<script" not in page and page.count("<svg") == 1
    assert "prefill 64" in page and "sine of the padding changed" in page and ">passed<" in page


def test_a_failure_cannot_be_overlooked(failed: tuple[Bundle, ParityResult]) -> None:
    bundle, result = failed
    page = parity_page(bundle, result)
    assert ">FAILED<" in page and "First module that diverges: layers.0.attention.rotary" in page
    written = io.StringIO()
    Console(width=200, file=written).print(parity_table(result))
    assert "FAIL all tokens" in written.getvalue()
    assert place(result).startswith("First module that diverges: layers.0.attention.rotary")


def test_errors_that_are_infinite_can_be_shown(spoilable: Bundle) -> None:
    model = onnx.load(spoilable.model)
    tensor = next(t for t in model.graph.initializer if t.name == "norm.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * float("nan"), "norm.weight"))
    (spoilable.path / "model.onnx.data").unlink()
    onnx.save(model, spoilable.model, save_as_external_data=True, location="model.onnx.data")
    result = validate(spoilable, lengths=(64,))
    assert not result.passed and result.place and result.place.divergence
    assert result.place.divergence.module == "norm"
    write_parity(spoilable, result)
    record = json.loads((spoilable.path / "reports/parity.json").read_text())
    assert record["cases"][0]["error"]["max_abs"] is None and ">inf<" in parity_page(spoilable, result)
