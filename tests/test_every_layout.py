"""A random checkpoint of every kind of decoder goes the whole way, from its folder to an engine."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.model.layouts import LAYOUTS, recognize
from fope_export.model.layouts.hf_fields import KINDS
from tests.conftest import small_decoder, write_native
from tests.model.hugging_face import config_of, multimodal, tensors_of, write
from tests.model.implementations import GIVEN, IMPLEMENTATIONS, qwen3_vl_moe


def variant(name: str, **fields: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, config_of(name) | fields, tensors_of(name))


ROWS: dict[str, Callable[[Path], Path]] = {
    "native": lambda folder: write_native(small_decoder(kv_heads=2), folder),
    **{name: row[0] for name, row in GIVEN.items()},
    **{
        name: IMPLEMENTATIONS[name].write
        for name in ("xtuner", "xtuner, yarn", "port, normalized", "port, a series for every query head")
    },
    "qwen2": variant("qwen2_rope"),
    "qwen3_moe": variant("qwen3_moe"),
    "qwen3_vl_text": variant("qwen3_rope", model_type="qwen3_vl_text"),
    "qwen3_vl_moe_text": lambda folder: qwen3_vl_moe(folder)[0],
    "interns1_pro": lambda folder: write(folder, *multimodal("intern_moe_grouped")),
}


def type_of(folder: Path) -> str:
    """The model type of its decoder."""
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("text_config", config)["model_type"])


def test_the_rows_are_all_layouts_and_model_types(tmp_path: Path) -> None:
    folders = [make(tmp_path / str(i)) for i, make in enumerate(ROWS.values())]
    layouts = {recognize(folder)[0] for folder in folders}
    assert layouts == {*LAYOUTS}
    assert {type_of(folder) for folder in folders if recognize(folder)[0] == "hugging_face"} == {*KINDS}


@pytest.mark.whole
@pytest.mark.parametrize("name", ROWS)
def test_from_checkpoint_to_engine(name: str, tmp_path: Path) -> None:
    folder, out = ROWS[name](tmp_path / "checkpoint"), str(tmp_path / "out")
    assert main(["export", str(folder), out]) == 0
    assert main(["optimize", out]) == 0
    assert main(["validate", out, "--lengths", "1,32"]) == 0
    assert main(["run", out, "--prompt-ids", "7,8,9", "--max-new-tokens", "4"]) == 0
    assert main(["build", out]) == 0
    assert not Bundle.open(out).damaged()
