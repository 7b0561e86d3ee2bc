"""Guessing from the command line."""

import json
import shutil
from pathlib import Path

import pytest

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.graph.export import export
from tests.conftest import small_decoder, write_native
from tests.serving.served import served

Capture = pytest.CaptureFixture[str]
PROMPT = "x = 1\nfor x = 1\nfor x = 1\nfor "


@pytest.mark.parametrize("way", [[], ["--speculate", "4"], ["--speculate", "auto"], ["--draft", "OUT"]])
def test_run_says_how_many_tokens_a_step_gave(way: list[str], asked: Bundle, capsys: Capture) -> None:
    command = ["run", str(asked.path), "--prompt", PROMPT, "--max-new-tokens", "60", "--json"]
    told = []
    for options in (["--speculate", "off"], [str(asked.path) if word == "OUT" else word for word in way]):
        assert main([*command, *options]) == 0
        told += json.loads(capsys.readouterr().out)
    assert told[0]["text"] == told[1]["text"] and told[0]["tokens_per_step"] == 1
    assert told[1]["tokens_per_step"] >= 1 + 0.1 * (way == ["--speculate", "4"])


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["run", "OUT", "--prompt", "x", "--speculate", "off", "--draft", "OUT"], "--draft guesses, and --speculate"),
        (["run", "OUT", "--prompt", "x", "--draft", "nowhere"], "nowhere is not a bundle"),
        (["run", "OUT", "--prompt", "x", "--draft", "NARROW"], "vocabularies of 256 and 250 tokens"),
        (["run", "OUT", "--prompt", "x", "--draft", "RENAMED"], "different tokenizers"),
        (["serve", "OUT", "--unvalidated", "--batch-invariant", "--speculate", "auto"], "rounded otherwise"),
        (["serve", "OUT", "--unvalidated", "--batch-invariant", "--draft", "OUT"], "rounded otherwise"),
        (["serve", "PASSED", "--draft", "OUT"], "was not validated"),
    ],
)
def test_what_excludes_itself_is_refused(
    command: list[str], reason: str, asked: Bundle, others: dict[str, Path], capsys: Capture
) -> None:
    places = {"OUT": asked.path, **others}
    words = [str(places.get(word, word)) for word in command]
    assert main([*words, *(["--port", "0"] if command[0] == "serve" else [])]) == 2
    told = capsys.readouterr()
    assert reason in told.err and "hint:" in told.err and not told.out
    if "tokens" in reason or "tokenizers" in reason:
        assert str(asked.path) in told.err and words[-1] in told.err


@pytest.mark.parametrize("word", ["maybe", "0", "-1", "1.5"])
def test_what_is_no_number_of_guesses(word: str, capsys: Capture) -> None:
    assert main(["run", "out", "--prompt", "x", f"--speculate={word}"]) == 2
    assert "neither auto nor off nor a number" in capsys.readouterr().err


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, asked: Bundle) -> dict[str, Path]:
    """Bundles that do not fit, and one that a report is about."""
    folder = tmp_path_factory.mktemp("others")
    narrow = export(write_native(small_decoder(vocab_size=250), folder / "narrow"), folder / "NARROW")
    renamed, passed = (Path(shutil.copytree(asked.path, folder / name)) for name in ("RENAMED", "PASSED"))
    changed = (renamed / "tokenizer.json").read_text().replace('"!"', '"\\u00a1\\u00a1"')
    Bundle.open(renamed).add({"tokenizer.json": changed.encode()})
    assert main(["validate", str(passed), "--lengths", "1,64"]) == 0
    return {"NARROW": narrow.path, "RENAMED": renamed, "PASSED": passed}


def test_a_server_guesses_and_counts(asked: Bundle) -> None:
    body = {"model": "model", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    texts, options = [], ["--unvalidated", "--slots", "2"]
    for way in ([], ["--speculate", "4"], ["--speculate", "3", "--draft", str(asked.path)]):
        with served([asked.path], *options, *way) as running:
            texts.append(running.ask(body).json()["choices"][0])
            looks, guesses, right = (
                running.metric(f"spec_decode_num_{name}_total")
                for name in ("drafts", "draft_tokens", "accepted_tokens")
            )
            assert (0 < right <= guesses and 0 < looks <= guesses) if way else looks == guesses == right == 0
    assert texts[0] == texts[1] == texts[2]
