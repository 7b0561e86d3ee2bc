"""The models that come along: small enough, trained, exported and equal to PyTorch, and able to write Python."""

import ast
import json
from pathlib import Path

import pytest

from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import EvaluationConfig, evaluate, loss_by_length
from fope_export.generation import generate_text
from fope_export.graph.export import export
from fope_export.serving.sampling import SamplingParams
from fope_export.shipped import NAMES, PASSKEY_NAMES, shipped
from fope_export.tokens import Tokenizer
from tests.printed import held


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name == "fope" else [pytest.mark.whole]) for name in NAMES]
)
def shipped_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(shipped(request.param), tmp_path_factory.mktemp("shipped") / request.param)


def test_together_they_are_at_most_16_mb() -> None:
    files = [path for name in (*NAMES, *PASSKEY_NAMES) for path in shipped(name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {"MODEL_CARD.md", "training.json", "config.json", "model.safetensors", "tokenizer.json"} == {
        path.name for path in files
    }


@pytest.mark.parametrize("pair", [NAMES, PASSKEY_NAMES], ids=["text", "passkey"])
def test_the_twins_saw_the_same(pair: dict[str, str]) -> None:
    fope, rope = (json.loads((shipped(name) / "training.json").read_text())["run"] for name in pair)
    assert fope | {"spectrum": ""} == rope | {"spectrum": ""}


@pytest.mark.whole
def test_fope_finds_passkeys_where_rope_finds_none(tmp_path: Path) -> None:
    """At four times the training length, from the exported files."""
    found = []
    for name in PASSKEY_NAMES:
        bundle = export(shipped(name), tmp_path / name)
        length = bundle.manifest.decoder().training_length
        found.append(evaluate(bundle, EvaluationConfig(lengths=(length, 4 * length), trials=2)).accuracy)
    fope, rope = found
    assert min(fope[length], rope[length]) >= 0.9
    assert fope[4 * length] >= max(3 * rope[4 * length], 0.3)


def test_validate_passes(shipped_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(shipped_bundle.path)]) == 0
    assert "decode to 100,000" in capsys.readouterr().out


def test_the_exported_model_has_learned_python(shipped_bundle: Bundle) -> None:
    trained = shipped_bundle.manifest.decoder().training_length
    text = as_tokens(python_source(held_out=True))[: (1 << 14) + 1]
    assert loss_by_length(load_backend(shipped_bundle), text, [trained])[trained] < 1.2


def test_it_writes_recognizable_python(shipped_bundle: Bundle) -> None:
    options = SamplingParams(max_new_tokens=300, temperature=0.5, seed=0)
    backend, tokenizer = load_backend(shipped_bundle), Tokenizer(shipped_bundle.path)
    pieces = generate_text(backend, tokenizer, ["class Reader:\n    def "], options)
    written = "class Reader:\n    def " + "".join(piece for _, piece in pieces)
    lines = written.splitlines()
    parsed = 0
    for end in range(2, len(lines)):
        try:
            ast.parse("\n".join(lines[:end]))
            parsed = end
        except SyntaxError:
            continue
    assert parsed >= 3 and "self" in written, written


def test_their_cards_state_data_steps_and_losses() -> None:
    for name in (*NAMES, *PASSKEY_NAMES):
        card = Path(shipped(name) / "MODEL_CARD.md").read_text()
        assert all(word in card for word in ("standard library", "steps of", "nats per byte", "| 256 | 512 |"))


@pytest.mark.parametrize("name", [*NAMES, *PASSKEY_NAMES])
def test_one_is_copied_whole(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "checkpoint"
    assert main(["demo", "--copy", name, str(out), "--json"]) == 0
    assert held("demo-copy", capsys.readouterr().out) == {"checkpoint": str(out)}
    copied, kept = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (out, shipped(name)))
    assert copied == kept and [path.name for path in out.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("name", "message"), [("gpt", "no model 'gpt' comes along"), ("fope", "is there already")])
def test_a_copy_is_refused(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    assert main(["demo", "--copy", name, str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and (tmp_path / "notes").read_text() == "mine"
