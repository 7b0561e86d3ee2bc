"""Prompts as they are written in files and arguments; output wherever it goes."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fope_export.answering import _read_prompts
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.errors import ConfigError
from fope_export.graph.export import export
from fope_export.model.decoder import Decoder
from tests.conftest import small_decoder, write_native


def follows(model: Decoder, chain: bytes) -> Decoder:
    """A model that writes one byte of the chain after the other: embedding and head alone decide."""
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_out.weight", "ff_out.weight")):
            parameter.zero_()
    model.embed.weight.zero_()
    model.lm_head.weight.zero_()
    for channel, (byte, after) in enumerate(pairwise(chain)):
        model.embed.weight[byte, channel] = 1
        model.lm_head.weight[after, channel] = 1
    return model


@pytest.fixture(scope="module")
def arrow(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Writes an arrow after A, and B after that."""
    folder = tmp_path_factory.mktemp("arrow")
    model = follows(small_decoder(num_layers=1), "A\u2192B".encode())
    return export(write_native(model, folder / "checkpoint"), folder / "bundle")


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.jsonl", '"x\u2028A"\n"B"\n', ["x\u2028A", "B"]),
        ("p.txt", "x\x0cA\nB\x85C\n", ["x\x0cA", "B\x85C"]),
        ("p.txt", "\ufeffA\r\n\r\n \n B \r\n", ["A", " B "]),
        ("p.txt", "a\x1cb\x1dc\x0bd\re", ["a\x1cb\x1dc\x0bd\re"]),
    ],
    ids=["separators in JSON", "separators", "Windows", "one line"],
)
def test_a_line_ends_with_a_line_feed_alone(name: str, content: str, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert _read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", b""), ("p.txt", b"caf\xe9"), ("p.jsonl", b"{"), ("p.jsonl", b"1"), ("p.jsonl", b"[" * 100_000)],
)
def test_files_without_prompts(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name) as caught:
        _read_prompts(tmp_path / name)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "option",
    ["--seed 1,2", "--seed -1", "--seed 1_0", "--max-new-tokens 1,2", "--top-k 0x1", "--threads 1,2", "--max-batch 2,3",
     "--chunk \u0661", "--top-p nan", "--temperature nan", "--temperature inf", "--stop="],
)  # fmt: skip
def test_a_number_is_one_number(option: str, arrow: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["run", str(arrow.path), "--prompt", "A", *option.split()])
    except SystemExit as refused:
        code = refused.code
    assert code == 2 and "error:" in capsys.readouterr().err


def run(arrow: Bundle, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fope_export.cli", "run", str(arrow.path), "--prompt", "A", *arguments]
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [*command, "--max-new-tokens", "4"], stderr=subprocess.PIPE, check=False, **options
    )
    return done


@pytest.mark.parametrize(("encoding", "printed"), [("cp1252", b"?B"), ("ascii", b"?B"), ("utf-8", "\u2192B".encode())])
def test_a_character_that_the_terminal_lacks_has_a_stand_in(encoding: str, printed: bytes, arrow: Bundle) -> None:
    narrow = {"env": os.environ | {"PYTHONIOENCODING": encoding}, "stdout": subprocess.PIPE}
    done = run(arrow, **narrow)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr
    done = run(arrow, "--json", **narrow)
    assert json.loads(done.stdout) == [{"prompt": "A", "text": "\u2192B", "tokens_per_step": 1.0}]


def test_a_closed_output_is_no_mistake(arrow: Bundle) -> None:
    assert run(arrow, preexec_fn=lambda: os.close(1)).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told(arrow: Bundle) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(arrow, stdout=full)
    assert done.returncode == 2 and b"No space left" in done.stderr
