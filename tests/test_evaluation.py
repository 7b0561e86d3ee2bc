"""Loss and passkeys by length of context."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fope_export.backends.base import Feeds, Logits
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.corpus import as_tokens, python_source
from fope_export.errors import ConfigError, ParityError
from fope_export.evaluation import DEPTHS, EvaluationConfig, evaluate, finds, loss_by_length
from fope_export.passkey import AFTER, BEFORE, DIGITS, QUESTION, passkey
from tests.conftest import small_decoder
from tests.printed import held
from tests.support import Forgetful


def test_it_is_the_cross_entropy_of_the_windows() -> None:
    model = small_decoder()
    tokens = np.random.default_rng(0).integers(0, 256, 65)
    losses = loss_by_length(EagerBackend(model), tokens, [16, 64])
    for length, loss in losses.items():
        windows = torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in range(0, 64, length)]))
        mask, positions = torch.ones_like(windows[:, 1:]), torch.arange(length).expand(len(windows), -1)
        logits, _ = model(windows[:, :-1], mask, positions, model.empty_cache(len(windows)))
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_every_length_scores_the_same_tokens() -> None:
    asked: Counter[int] = Counter()

    def uniform(feeds: Feeds) -> Logits:
        asked[feeds.input_ids.shape[1]] += feeds.input_ids.size
        return np.zeros((*feeds.input_ids.shape, 256), np.float32)

    losses = loss_by_length(Forgetful(uniform, 256), np.zeros(1000, np.int64), [10, 50, 250])
    assert losses == pytest.approx(dict.fromkeys((10, 50, 250), np.log(256)))
    assert asked == {10: 750, 50: 750, 250: 750}


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ParityError, match="fill no window"):
        loss_by_length(EagerBackend(small_decoder()), np.zeros(64, np.int64), [64])


def test_held_out_files_are_never_trained_on() -> None:
    train_on, held_out = (python_source(held_out=side) for side in (False, True))
    assert len(train_on) > 10 * len(held_out) > 1e6
    files = held_out.split(b"\0")
    assert not any(text in train_on for text in files if len(text) > 1000)
    assert as_tokens(b"\x00\xff").tolist() == [0, 255]


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


TEXT = np.frombuffer(b"so much of nothing " * 100, np.uint8).astype(np.int64)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_passkey_stands_where_it_should(depth: float) -> None:
    task = passkey(as_bytes, TEXT, 256, depth, np.random.default_rng(0))
    assert len(task.prompt) + len(task.answer) == 256
    prompt, key = (bytes(ids.astype(np.uint8)).decode() for ids in task)
    needle = f"{BEFORE}{key}{AFTER}"
    text = prompt.removesuffix(QUESTION).replace(needle, "")
    assert prompt.index(needle) == round(depth * len(text)) and text in TEXT.astype(np.uint8).tobytes().decode()
    assert key[0] == " " and key[1:].isdecimal() and len(key) == 1 + DIGITS


def test_no_two_keys_are_alike() -> None:
    generator = np.random.default_rng(0)
    assert len({bytes(passkey(as_bytes, TEXT, 128, 0.5, generator).answer) for _ in range(20)}) == 20


@pytest.mark.parametrize("length", [80, 5000], ids=["no room", "too little text"])
def test_a_length_that_holds_no_passkey_is_refused(length: int) -> None:
    with pytest.raises(ParityError, match=f"a passkey in {length} tokens"):
        passkey(as_bytes, TEXT, length, 0.5, np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [None, 0, 3, DIGITS], ids=["right", "first", "fourth", "last"])
def test_a_key_is_found_if_every_token_is_right(wrong: int | None) -> None:
    task = passkey(as_bytes, TEXT, 256, 0.5, np.random.default_rng(0))
    whole = np.concatenate(task)
    if wrong is not None:
        whole[len(task.prompt) + wrong] ^= 1

    def knows(feeds: Feeds) -> Logits:
        return np.eye(256, dtype=np.float32)[whole[feeds.position_ids + 1]]

    assert finds(Forgetful(knows, 256), task) == (wrong is None)


def test_the_command_measures_a_bundle_beside_its_twin(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data := tmp_path / "text").write_text("so much of nothing " * 100)
    folder = str(bundle.path)
    small = ["--lengths", "100,200", "--trials", "2", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(["evaluate", folder, "--against", folder, *small, "--json"]) == 0
    record = held("evaluate", capsys.readouterr().out)
    assert record == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    first, twin = record["models"]
    assert [first.pop("name"), twin.pop("name")] == [f"{bundle.path.name} 1", f"{bundle.path.name} 2"]
    assert first == twin and list(first["losses"]) == ["100", "200"] and len(first["found"]) == 2 * len(DEPTHS)
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "0 of 2" in page and f"{first['losses']['200']:.3f}" in page and "<svg" in page
    assert main(["evaluate", folder, *small]) == 0
    assert "passkeys" in capsys.readouterr().out


def test_lengths_and_texts_that_cannot_be_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    (data := tmp_path / "text").write_bytes(b"\xff" * 5000)
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        evaluate(bundle, EvaluationConfig(lengths=(100,)), data=data)
    with pytest.raises(ParityError, match="do not cut the same windows"):
        evaluate(bundle, EvaluationConfig(lengths=(100, 250)))
    with pytest.raises(ConfigError, match="trials"):
        EvaluationConfig(trials=0)
