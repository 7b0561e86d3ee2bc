"""Bad checkpoints: each ends in one clear message with a hint, exit code 2, no traceback, and no output folder."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fope_export.cli import main
from tests.conftest import small_decoder, write_native

Spoil = Callable[[Path], object]


def flag(old: str, new: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return spoil


def tensors(change: Callable[[dict[Any, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        state = torch.load(folder / "model.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "model.pt")

    return spoil


def truncate(name: str, share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(__file__).parent / "executed",)


FF = "transformer.blocks.1.ff_proj.weight"
COEF = "transformer.blocks.0.pos_emb.sin_coef"


def flat_coefficients(folder: Path) -> None:
    tensors(lambda state: state.update({COEF: state[COEF].flatten()}))(folder)
    flag("fourier_norm: false", "fourier_norm: true")(folder)


CASES: dict[str, tuple[Spoil, str]] = {
    "training length": (flag("max_sequence_length: 512", "max_sequence_length: 1024"), "D is 16 in the weights but 18"),
    "unknown flag": (flag("fourier: true", "fourier: true\n  fourrier: 1"), "unknown field `fourrier`"),
    "flag of another type": (flag("n_layers: 2", "n_layers: two"), "n_layers: Expected `int`"),
    "unsupported activation": (flag("activation_type: swiglu", "activation_type: gelu"), "activation_type is 'gelu'"),
    "alibi": (flag("alibi: false", "alibi: true"), "alibi is True"),
    "learnable frequencies": (flag("rope_learnable: false", "rope_learnable: true"), "rope_learnable is True"),
    "negative frequencies": (flag("rope_include_neg_freq: false", "rope_include_neg_freq: true"), "neg_freq is True"),
    "distribution": (flag("distribution: exponential", "distribution: linear"), "rope_init_distribution is 'linear'"),
    "fourier without rope": (flag("rope: true", "rope: false"), "fourier needs rope"),
    "extension without length": (flag("len_extra: false", "len_extra: true"), "len_extra needs len_extra_orig_length"),
    "unknown extension": (flag("len_extra_type: PI", "len_extra_type: CLEX\n  len_extra: true"), "config.yaml"),
    "heads that do not divide": (flag("n_heads: 2", "n_heads: 3"), "d_model is not a multiple of n_heads"),
    "no heads": (flag("n_heads: 2", "n_heads: 0"), "n_heads: Expected `int` >= 1"),
    "no length": (flag("max_sequence_length: 512", "max_sequence_length: 0"), "max_sequence_length: Expected"),
    "no epsilon": (flag("layer_norm_eps: 1.0e-06", "layer_norm_eps: .nan"), "layer_norm_eps"),
    "negative base": (flag("rope_theta: 10000", "rope_theta: -1"), "rope_theta: Expected `float` > 0"),
    "impossible date": (flag("run_name: fope60m", "run_name: 2024-13-45"), "not valid YAML"),
    "one layer more": (flag("n_layers: 2", "n_layers: 3"), "missing: transformer.blocks.2"),
    "one layer less": (flag("n_layers: 2", "n_layers: 1"), "left over: transformer.blocks.1"),
    "rope instead of fope": (flag("fourier: true", "fourier: false"), "4 tensors left over"),
    "missing tensor": (tensors(lambda state: state.pop(FF)), f"1 tensors missing: {FF}"),
    "extra tensor": (tensors(lambda state: state.update(extra=torch.ones(1))), "1 tensors left over: extra"),
    "misshapen tensor": (tensors(lambda state: state.update({FF: state[FF][:-1]})), "has shape (1023, 128)"),
    "NaN": (tensors(lambda state: state[FF].view(-1)[5].fill_(torch.nan)), f"{FF} holds NaN or infinity"),
    "infinite coefficient": (tensors(lambda state: state[COEF][0, 0].fill_(torch.inf)), "holds NaN or infinity"),
    "integer weights": (tensors(lambda state: state.update({FF: state[FF].int()})), "expected dense floating point"),
    "sparse weights": (tensors(lambda state: state.update({FF: state[FF].to_sparse()})), "expected dense floating"),
    "flat coefficients": (flat_coefficients, "has shape (512,)"),
    "numbers as names": (tensors(lambda state: state.update({3: torch.ones(1)})), "expected a dictionary"),
    "truncated weights": (truncate("model.pt", 0.5), "cannot be read"),
    "truncated config": (truncate("config.yaml", 0.4), "config.yaml"),
    "broken yaml": (write("config.yaml", b"model: [1, 2"), "not valid YAML"),
    "config of nothing": (write("config.yaml", b"a: 1"), "no model: section"),
    "no weights": (lambda folder: (folder / "model.pt").unlink(), "no weights"),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), "no checkpoint layout recognized"),
    "code in the weights": (write("model.pt", pickle.dumps({"a": Evil()})), "not a plain file of tensors"),
    "text as weights": (write("model.pt", b"import os"), "not a plain file of tensors"),
    "list of tensors": (lambda folder: torch.save([torch.ones(1)], folder / "model.pt"), "expected a dictionary"),
    "truncated safetensors": (write("model.safetensors", b"\x40\0\0\0\0\0\0\0{}"), "cannot be read"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_olmo_checkpoint(name: str, editable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = CASES[name]
    spoil(editable)
    refused(editable, message, tmp_path, capsys)
    assert not (Path(__file__).parent / "executed").exists()


def config(change: dict[str, Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        data = json.loads(path.read_text())
        spectrum = data["spectrum"] | change.pop("spectrum", {})
        path.write_text(json.dumps(data | change | {"spectrum": spectrum}))

    return spoil


def without_sign(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    del data["spectrum"]["sign"]
    (folder / "config.json").write_text(json.dumps(data))


def ascending(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = "layers.1.attention.rotary.freq"
    save_file(state | {name: state[name].flip(0)}, folder / "model.safetensors")


NATIVE: dict[str, tuple[Spoil, str]] = {
    "training length": (config({"training_length": 1024}), "D is 3, but a training_length of 1024 keeps 5"),
    "unknown field": (config({"rotary_base": 3}), "unknown field `rotary_base`"),
    "unstated field": (without_sign, "missing required field `sign`"),
    "sign of two": (config({"spectrum": {"sign": 2}}), "spectrum.sign"),
    "groups": (config({"spectrum": {"groups": 3}}), "3 coefficient groups do not divide 4"),
    "token outside": (config({"eos_token_id": 256}), "eos_token_id is 256, outside a vocabulary of 256"),
    "ascending frequencies": (ascending, "frequencies must descend"),
    "broken json": (truncate("config.json", 0.7), "not valid JSON"),
    "truncated weights": (truncate("model.safetensors", 0.9), "cannot be read"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_bad_native_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_native(small_decoder(), tmp_path / "checkpoint")
    spoil, message = NATIVE[name]
    spoil(folder)
    refused(folder, message, tmp_path, capsys)


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "nowhere", "does not exist", tmp_path, capsys)


def refused(folder: Path, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    told = [line for line in errors.splitlines() if not line.startswith("✓")]
    assert message in errors
    assert told[0].startswith("error: ") and told[-1].startswith("hint:  ") and len(told[-1]) > 12
    assert len(told) == 2 and "Traceback" not in errors
    assert sorted(tmp_path.iterdir()) == before
