"""A bundle of a checkpoint and an adapter: exported, validated, found again, and told from others."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from safetensors.torch import load_file, save_file

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.errors import BundleError, CheckpointError, ConfigError
from fope_export.graph.export import export
from fope_export.manifest import MANIFEST
from fope_export.model.checkpoint import load_checkpoint, source_of
from fope_export.parity.run import validate
from fope_export.tokens import Tokenizer, byte_tokenizer
from tests.model.hugging_face import Tensors, config_of, tensors_of, write
from tests.model.peft_adapters import ATTENTION, merged, saved, skeleton, trained

CONFIG = config_of("intern_dense") | {"vocab_size": 256, "num_hidden_layers": 1}
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def with_rows(count: int) -> Tensors:
    """The tensors of the base, but for the vocabulary."""
    tensors = {name: tensor for name, tensor in tensors_of("intern_dense").items() if ".layers.1." not in name}
    return tensors | {name: tensors[name].repeat(3, 1)[:count].clone() for name in ROWS}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and the bundle of both."""
    place = tmp_path_factory.mktemp("adapted")
    write(place / "base", CONFIG, with_rows(256))
    (place / "base/tokenizer.json").write_text(byte_tokenizer().to_str())
    saved(trained(skeleton(with_rows(256))), place / "adapter")
    assert main(["export", str(place / "base"), str(place / "out"), "--adapter", str(place / "adapter")]) == 0
    return place


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(place, tmp_path / "place")


def test_it_is_the_bundle_of_what_peft_merges(place: Path, tmp_path: Path) -> None:
    tensors = merged(trained(skeleton(with_rows(256))))
    write(tmp_path / "merged", CONFIG, {name: tensor.contiguous() for name, tensor in tensors.items()})
    wanted, made = export(tmp_path / "merged", tmp_path / "out"), Bundle.open(place / "out")
    names = ("model.onnx", "model.onnx.data")
    assert [made.manifest.files[name] for name in names] == [wanted.manifest.files[name] for name in names]
    assert '"adapter"' not in (wanted.path / MANIFEST).read_text()  # as before there were any
    with pytest.raises(BundleError, match="was exported without an adapter"):
        source_of(wanted, adapter=place / "adapter")


def test_it_validates_and_names_its_adapter(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, moved = str(own / "out"), ["--checkpoint", str(own / "base"), "--adapter", str(own / "adapter")]
    assert main(["validate", out, "--lengths", "7", *moved]) == 0
    capsys.readouterr()
    assert main(["inspect", out, "--json"]) == 0
    source = json.loads((own / "out" / MANIFEST).read_text())["source"]
    assert source["adapter"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(capsys.readouterr().out)["manifest"]["source"] == source
    assert source["adapter"]["path"] in (own / "out/reports/parity.html").read_text()


def test_another_base_or_adapter_is_told(place: Path, own: Path) -> None:
    made = Bundle.open(own / "out")
    assert source_of(made).adapter == place / "adapter"
    assert source_of(made, own / "base", own / "adapter").adapter == own / "adapter"
    with pytest.raises(BundleError, match=r"its adapter is not at .*nowhere") as caught:
        validate(made, lengths=(7,), adapter=own / "nowhere")
    assert "--adapter" in caught.value.hint
    path = own / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 7}))
    with pytest.raises(BundleError, match=r"is not the adapter that .* adapter_config\.json differ") as caught:
        source_of(made, adapter=own / "adapter")
    assert "--adapter" in caught.value.hint
    (own / "base/tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"is not the checkpoint that .* tokenizer\.json differ"):
        source_of(made, own / "base")


def with_token(folder: Path) -> None:
    """A tokenizer with one token more."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|new|>", special=True)])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())


def test_added_tokens_come_with_their_rows(own: Path) -> None:
    """The bundle has the tokenizer and the vocabulary of the adapter."""
    adapted = trained(skeleton(with_rows(260)), target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"])
    shutil.rmtree(own / "adapter")
    with_token(saved(adapted, own / "adapter"))
    made = export(own / "base", own / "out", adapter=own / "adapter")
    assert made.manifest.decoder().vocab_size == 260
    assert Tokenizer(made.path).encode("a<|new|>b") == [97, 256, 98]
    assert made.manifest.source.adapter and "tokenizer.json" in made.manifest.source.adapter.files
    assert source_of(made).tokenizer_folder == own / "adapter"
    assert validate(made, lengths=(7,)).passed


def test_tokens_without_rows_are_refused(own: Path) -> None:
    with_token(own / "adapter")
    with pytest.raises(CheckpointError, match="has token 256, the embedding has 256 rows") as caught:
        load_checkpoint(own / "base", adapter=own / "adapter")
    assert "save_embedding_layers" in caught.value.hint
    (own / "adapter/tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer") as caught:
        load_checkpoint(own / "base", adapter=own / "adapter")
    assert "base's" in caught.value.hint


def test_an_embedding_that_lacks_a_token_of_the_base_is_refused(own: Path) -> None:
    write(own / "base", CONFIG | {"eos_token_id": 255}, with_rows(256))
    file = own / "adapter/adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": with_rows(200)[name] for name in ROWS}, file)
    with pytest.raises(ConfigError, match=r"safetensors: the embedding has 200 rows: eos_token_id is 255"):
        load_checkpoint(own / "base", adapter=own / "adapter")
