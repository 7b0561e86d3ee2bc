"""Training: checkpoints that load, twins that share their weights, and a resumed run that equals an unbroken one."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from rich.console import Console

from fope_export.model.checkpoint import load_checkpoint

RUN = train.Run(
    "fope", steps=4, batch=2, length=32, layers=1, heads=1, ff=16, learning_rate=1e-3, gain=0.3, seed=0, data=""
)
TOKENS = np.random.default_rng(0).integers(0, 256, 2000)
QUIET = Console(quiet=True)


def test_the_command_makes_two_checkpoints_with_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 200)
    small = "--steps 2 --batch 2 --length 32 --layers 1 --heads 1 --ff 16".split()
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "out"), "--text", str(text), *small])
    train.main()
    for kind in ("fope", "rope"):
        checkpoint = load_checkpoint(tmp_path / "out" / kind)
        assert checkpoint.config.floored == (kind == "fope")
        card = (tmp_path / "out" / kind / "MODEL_CARD.md").read_text()
        assert "text.txt" in card and "| 32 | 64 | 128 | 256 | 512 |" in card


def test_the_twins_start_from_the_same_weights() -> None:
    fope, rope = (dict(train.build(replace(RUN, spectrum=kind)).named_parameters()) for kind in ("fope", "rope"))
    assert fope.keys() == rope.keys()
    assert all(torch.equal(fope[name], rope[name]) for name in fope if ".rotary." not in name)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    whole, *_ = train.train(RUN, TOKENS, folders[0], "cpu", QUIET)
    real = train.batch_of

    def interrupted(tokens: np.ndarray, run: train.Run, step: int) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return real(tokens, run, step)

    monkeypatch.setattr(train, "batch_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(RUN, TOKENS, folders[1], "cpu", QUIET)
    monkeypatch.setattr(train, "batch_of", real)
    resumed, *_ = train.train(RUN, TOKENS, folders[1], "cpu", QUIET)
    for (name, left), right in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train.train(replace(RUN, steps=1), TOKENS, tmp_path, "cpu", QUIET)
    with pytest.raises(SystemExit, match="other settings"):
        train.train(RUN, TOKENS, tmp_path, "cpu", QUIET)


def test_windows_with_passkeys_grow_and_end_with_the_key() -> None:
    run = replace(RUN, task=train.PASSKEY, length=128, steps=10)
    assert [train.length_of(run, step) for step in (0, 5, 9)] == [train.SHORTEST, 128, 128]
    assert train.length_of(RUN, 0) == RUN.length
    for row in train.batch_of(TOKENS, run, 9).numpy().astype(np.uint8):
        text = bytes(row)
        assert len(text) == 129 and text.count(text[-6:]) == 2 and text[-6:].strip().isdigit()


def test_only_the_key_weighs_more() -> None:
    run = replace(RUN, task=train.PASSKEY, length=128)
    logits, targets = torch.zeros(2, 100, 256), torch.zeros(2, 100, dtype=torch.int64)
    logits[:, -6:, 0] = 50  # the key is known, and the text is not
    weights = train.weights_of(run)
    assert weights is not None and weights[-6] > weights[-7] == weights[0] and train.weights_of(RUN) is None
    share = 94 / (94 + 6 * train.ANSWER)
    assert train._loss(logits, targets, weights).item() == pytest.approx(share * np.log(256), rel=1e-4)
