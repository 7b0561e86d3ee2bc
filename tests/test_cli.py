"""The command line: results on stdout, errors and progress on stderr, exit codes 0, 1, 2."""

import io
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from fope_export import place
from fope_export.answering import InOrder
from fope_export.bundle import Bundle
from fope_export.cli import main
from tests.printed import held

Capture = pytest.CaptureFixture[str]


def test_export_validate_run_inspect(native: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(native), out]) == 0
    assert "next: fope-export validate" in capsys.readouterr().out
    assert main(["validate", out, "--lengths", "1,64"]) == 0
    told = capsys.readouterr()
    assert "passed" in told.out and "report: " in told.out and "positions shifted by one" in told.out
    assert main(["run", out, "--prompt", "def ", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    for path in (str(native), out, f"{out}/model.onnx"):
        assert main(["inspect", path]) == 0
        assert "fope" in capsys.readouterr().out


def test_warnings_are_shown_by_the_command_line_alone(spoilable: Bundle, capsys: Capture) -> None:
    with place.holding(spoilable.path, 0, lambda folder: None):
        assert main(["optimize", str(spoilable.path), "--lock-timeout", "0.3"]) == 2
    assert re.search(r"^.*: waiting for `.*` on .*\nerror: ", capsys.readouterr().err)
    code = "import fope_export, logging; logging.getLogger('fope_export.lock').warning('waiting')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == done.stdout == ""
    assert [type(handler) for handler in logging.getLogger("fope_export").handlers] == [logging.NullHandler]


def test_json_everywhere(native: Path, spoilable: Bundle, tmp_path: Path, capsys: Capture) -> None:
    folder = str(spoilable.path)

    def told(name: str, *command: str) -> Any:
        assert main([*command, "--json"]) == 0
        return held(name, capsys.readouterr().out)

    assert told("doctor", "doctor")["abilities"]["export a checkpoint"] == ""
    assert told("export", "export", str(native), str(tmp_path / "out"))["bundle"] == str(tmp_path / "out")
    assert told("optimize", "optimize", folder)["file"] == "model.ort.onnx"
    result = told("validate", "validate", folder, "--lengths", "64")
    assert result["passed"] is True and result["seconds"] > sum(case["seconds"] for case in result["cases"]) > 0
    assert told("check", "check", folder) == {folder: ""}
    assert told("run", "run", folder, "--prompt", "x", "--max-new-tokens", "3")[0]["prompt"] == "x"
    assert len(told("run-prompt-ids", "run", folder, "--prompt-ids", "1,2", "--max-new-tokens", "3")) == 3
    assert told("inspect", "inspect", folder)["manifest"]["export"]["dtype"] == "fp32"
    assert told("inspect", "inspect", f"{folder}/model.onnx")["nodes"]["fope::FopeRotary"] == 2
    assert told("inspect", "inspect", str(native))["layout"] == "native"


def test_a_failed_check_exits_with_1_and_names_the_layer(spoilable: Bundle, capsys: Capture) -> None:
    model = onnx.load(spoilable.model, load_external_data=False)
    node = next(n for n in model.graph.node if n.name.startswith("layers.1.attention.rotary"))
    next(a for a in node.attribute if a.name == "sin_pad").f = 0.0
    onnx.save(model, spoilable.model)
    assert main(["validate", str(spoilable.path), "--lengths", "64"]) == 1
    told = capsys.readouterr().out
    assert "FAILED" in told and "First module that diverges: layers.1.attention.rotary" in told
    assert main(["run", str(spoilable.path), "--prompt", "x"]) == 2
    assert "differs from the hash" in capsys.readouterr().err


def test_a_batch_of_prompts_from_a_file(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    lines, quoted = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("def a(\n\nclass B\n")
    quoted.write_text('"def a("\n"two\\nlines"\n')
    for path, second in ((lines, "class B"), (quoted, "two\nlines")):
        command = ["run", str(bundle.path), "--prompts", str(path), "--max-new-tokens", "4", "--json"]
        assert main(command) == 0
        assert [each["prompt"] for each in json.loads(capsys.readouterr().out)] == ["def a(", second]
    assert main(["run", str(bundle.path), "--prompts", str(lines), "--max-new-tokens", "4"]) == 0
    assert "--- class B" in capsys.readouterr().out


def test_inputs_are_saved_and_loaded(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "bundle")
    path = str(tmp_path / "inputs.json")
    assert main(["validate", str(copy), "--lengths", "64", "--save-inputs", path]) == 0
    assert main(["validate", str(copy), "--load-inputs", path]) == 0
    assert "input 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "OUT", "--prompt", "x", "--backend", "tpu"], "no backend 'tpu'"),
        (["run", "OUT", "--prompt", "x", "--temperature", "-1"], "temperature: Expected `float` >= 0"),
        (["run", "OUT", "--prompt", "x", "--top-p", "0"], "top_p"),
        (["run", "OUT", "--prompt", ""], "a prompt is empty"),
        (["run", "OUT", "--prompt-ids", "1,300"], "token 300 is outside the vocabulary of 256"),
        (["run", "OUT", "--prompt-ids", "1", "--stop", "x"], "--stop needs text"),
        (["run", "OUT", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["run", "nowhere", "--prompt", "x"], "nowhere is not a bundle"),
        (["validate", "OUT", "--backend", "torch"], "PyTorch is the yardstick"),
        (["validate", "nowhere"], "nowhere is not a bundle"),
        (["validate", "OUT", "--lengths", "0"], "lengths"),
        (["validate", "OUT", "--checkpoint", "nowhere"], "its checkpoint is not at nowhere"),
        (["validate", "OUT", "--load-inputs", "nowhere.json"], "nowhere.json"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", "OUT/config.json"], "not a valid ONNX file"),
        (["export", "nowhere", "out"], "nowhere does not exist"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_misuse_exits_with_2_one_message_and_a_hint(
    arguments: list[str], message: str, bundle: Bundle, capsys: Capture
) -> None:
    assert main([argument.replace("OUT", str(bundle.path)) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err and "\nhint:  " in told.err and "Traceback" not in told.err and not told.out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["export"], "`fope-export export --help`"),
        (["vadilate"], "Did you mean validate?"),
        (["run", "x", "--prompt", "a", "--tempertaure", "1"], "Did you mean --temperature?"),
        (["export", "x", "y", "--dtype", "fp61"], "Did you mean fp16?"),
        (["run", "x", "--prompt-ids", "a,b"], "`fope-export run --help`"),
        (["validate", "x", "--seed", "-1"], "`fope-export validate --help`"),
    ],
)
def test_misspelt_commands_and_missing_arguments(arguments: list[str], hint: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and hint in told.err and not told.out
    assert main([*arguments, "--json"]) == 2
    error = held("error", capsys.readouterr().err)["error"]
    assert error.keys() == {"type", "message", "hint", "exit_code"} and hint in error["hint"]


def test_beside_json_an_error_is_all_that_stderr_has(spoilable: Bundle, capsys: Capture) -> None:
    spoilable.model.write_bytes(b"no graph")
    assert main(["run", str(spoilable.path), "--prompt", "a", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["exit_code"] == 2


def test_quiet_tells_the_result_alone(native: Path, tmp_path: Path, capsys: Capture) -> None:
    for more in ([], ["--quiet"], ["--verbose"]):
        assert main(["export", str(native), str(tmp_path / "out"), *more]) == 0
        told = capsys.readouterr()
        assert "next: " in told.out
        assert bool(told.err) == (more != ["--quiet"]) and ("TransposeWeights" in told.err) == (more == ["--verbose"])


def test_prompts_come_from_a_pipe_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def \nclass \n")))
    assert main(["run", str(bundle.path), "--prompts", "-", "--max-new-tokens", "2"]) == 0
    assert re.fullmatch(r"--- def \n.*\n--- class \n.*\n", capsys.readouterr().out, re.DOTALL)


def test_answers_are_shown_in_order_as_they_come(capsys: Capture) -> None:
    ended = set[int]()
    shown = InOrder(["one", "two", "three"], ended)
    for row, piece, told in ((1, "b", "--- one\n"), (0, "a", "a"), (2, "c", ""), (0, "A", "A")):
        shown.push(row, piece)
        assert capsys.readouterr().out == told
    ended |= {0, 2}
    shown.push(1, "B")
    assert capsys.readouterr().out == "\n--- two\nbB"
    shown.close()
    assert capsys.readouterr().out == "\n--- three\nc\n"


def test_a_shell_completes_commands(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 0 and "evaluate" in capsys.readouterr().out


def test_help_teaches(capsys: Capture) -> None:
    assert main([]) == 2
    told = capsys.readouterr().out
    assert "examples:" in told and "exit codes" in told
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fope-export 0.")


def test_traceback_on_request(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(tmp_path / "nowhere"), "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_who_leaves_early_gets_no_traceback(bundle: Bundle) -> None:
    command = f"{sys.executable} -m fope_export.cli inspect {bundle.path} --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr


def test_a_mistake_of_ours_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("fope_export.backends.machine.read_machine", lambda: 1 / 0)
    assert main(["doctor"]) == 70
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and "please report" in told
