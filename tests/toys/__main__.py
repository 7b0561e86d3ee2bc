"""`python -m tests.toys quantization FOLDER` (or dtype, or backend): every stage with the row, and what it says."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fope_export.backends.choose import BACKENDS, abilities, choose
from fope_export.backends.machine import read_machine
from fope_export.backends.versions import too_old
from fope_export.benchmark.contenders import ALLOWED
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.config import ExportConfig
from fope_export.errors import BackendError, ConfigError
from fope_export.parity.run import validate
from fope_export.tensorrt.build import build
from tests.conftest import small_decoder, write_native
from tests.spoiling import weights
from tests.toys import TOY, WIDE
from tests.toys.backend import NAME, ROW


def quantization(folder: Path) -> None:
    made = stages(folder, "--quantize", TOY.name)
    assert "toy weights" in made.manifest.export.described and too_old("x", "2.0", made.manifest.export) == ""
    reason = too_old("x", "2.0", ExportConfig(quantize=TOY.name, dtype="fp16"))
    assert reason == "x is 2.0, and toy in fp16 needs 99.0: pip install 'x>=99.0'"
    with pytest.raises(ConfigError, match="quantize is toy and dtype is wide") as caught:
        ExportConfig(quantize=TOY.name, dtype=WIDE.name)
    assert caught.value.hint == "Choose dtype fp32 or fp16, or quantize int8-qdq or fp8-qdq or int4-awq or nvfp4."
    refused(made, "sm86 has no toys", "export with --quantize int8-qdq or int4-awq for it")
    weights(f"layers.0.attention.att_proj.weight.{TOY.numbers}", lambda a: a[::-1].copy())(made)
    place = validate(made, lengths=(7, 64)).place
    assert place is not None and place.tensors == ("layers.0.attention.att_proj.weight",)


def dtype(folder: Path) -> None:
    made = stages(folder, "--dtype", WIDE.name)
    assert {port.dtype for port in made.manifest.inputs if port.name.startswith("past_")} == {WIDE.element}
    assert validate(made, lengths=(7,)).dtype == "float32"  # that of the copy which ONNX Runtime computes
    refused(made, "sm86 has no float64", "Export with --dtype fp16")


def backend(folder: Path) -> None:
    BACKENDS[NAME] = ROW
    checkpoint, out = write_native(small_decoder(), folder / "checkpoint"), str(folder / "out")
    assert main(["export", str(checkpoint), out]) == 0
    for command in (
        ["validate", out, "--lengths", "1,64"], ["run", out, "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]
    ):  # fmt: skip
        assert main([*command, "--backend", NAME, "--traceback"]) == 0, command
    report = json.loads((folder / "out" / "reports" / "parity.json").read_text())
    assert report["backend"] == NAME
    assert f"run its checkpoint in {NAME}" in abilities(read_machine())
    with pytest.raises(BackendError, match="toys need a core"):
        choose(NAME, replace(read_machine(), cores=0))


def stages(folder: Path, *options: str) -> Bundle:
    """Export, optimize, validate and run by the command line."""
    checkpoint, out = write_native(small_decoder(), folder / "checkpoint"), str(folder / "out")
    for command in (
        ["export", str(checkpoint), out, *options], ["optimize", out], ["validate", out, "--lengths", "1,64"],
        ["run", out, "--prompt-ids", "1,2,3", "--max-new-tokens", "4"], ["inspect", out],
    ):  # fmt: skip
        assert main([*command, "--traceback"]) == 0, command
    assert ALLOWED[options[1]] > 0
    return Bundle.open(out)


def refused(made: Bundle, message: str, hint: str) -> None:
    """By the build, before anything starts."""
    with pytest.raises(ConfigError, match=message) as caught:
        build(made)
    assert hint in caught.value.hint


if __name__ == "__main__":
    {each.__name__: each for each in (quantization, dtype, backend)}[sys.argv[1]](Path(sys.argv[2]))
