"""The paper's checkpoints: its own logits for every flag that changes a model."""

import base64
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fope_export.errors import CheckpointError, ConfigError
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.layouts.olmo import tensor_name
from tests.conftest import VARIANTS, variant_flags, variant_tensors
from tests.model.theirs import EXPECTED, IDS, same_as_theirs


@pytest.mark.parametrize("name", VARIANTS["cases"])
def test_variants_of_the_flags(name: str, write_variant: Callable[[str], Path]) -> None:
    same_as_theirs(load_checkpoint(write_variant(name)).model, IDS, EXPECTED[name])


@pytest.mark.parametrize("length", [1, 16, 512, 600, 1500])
def test_the_reference_checkpoint(length: int, olmo_fope: Path) -> None:
    expected = np.load(olmo_fope / "expected.npz")
    same_as_theirs(load_checkpoint(olmo_fope).model, expected[f"ids_{length}"], expected[f"logits_{length}"])


def encoded(name: str) -> str:
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode()


@pytest.mark.parametrize("encode", [encoded, str], ids=["pickled names", "plain names"])
def test_safetensors_are_preferred_and_their_names_decoded(
    encode: Callable[[str], str], write_variant: Callable[[str], Path]
) -> None:
    folder = write_variant("plain")
    (folder / "model.pt").write_bytes(b"not looked at")
    save_file({encode(name): t for name, t in variant_tensors("plain").items()}, folder / "model.safetensors")
    same_as_theirs(load_checkpoint(folder).model, IDS, EXPECTED["plain"])


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(__file__).parent / "executed",)


def test_a_name_that_would_run_code_is_refused() -> None:
    with pytest.raises(CheckpointError, match="refers to"):
        tensor_name(base64.urlsafe_b64encode(pickle.dumps(((Evil(),), False))).decode())
    assert not (Path(__file__).parent / "executed").exists()


@pytest.mark.parametrize("name", ["transformer.ln_f.weight", "extra", "YWJj", ""])
def test_other_names_pass(name: str) -> None:
    assert tensor_name(name) == name


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_the_hugging_face_wrapper(weights: str, tmp_path: Path) -> None:
    wrapper = {"model_type": "hf_olmo", "architectures": ["OLMoForCausalLM"], "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(wrapper | variant_flags("yarn_after")))
    tensors = {f"model.{name}": tensor for name, tensor in variant_tensors("yarn_after").items()}
    if weights.endswith(".bin"):
        torch.save(tensors, tmp_path / weights)
    else:
        save_file(tensors, tmp_path / weights)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.layout == "hf_olmo"
    same_as_theirs(checkpoint.model, IDS, EXPECTED["yarn_after"])


@pytest.mark.parametrize(("field", "value"), [("rope_clamp_floor_freq", "false"), ("fourier", 1), ("n_layers", "2")])
def test_json_says_flags_by_their_types(field: str, value: Any, tmp_path: Path) -> None:
    """The fork's code takes any text for true, and does not read it as YAML does."""
    flags = {"model_type": "hf_olmo"} | variant_flags("yarn_after") | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(flags))
    with pytest.raises(ConfigError, match=f"{field}: Expected"):
        load_checkpoint(tmp_path)
