"""Export without the model in memory: piece by piece, with the same bytes, and the same refusals."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fope_export.config import ExportConfig
from fope_export.errors import CheckpointError, ExportError
from fope_export.graph.export import export
from fope_export.graph.streaming import one_ahead
from fope_export.hashing import BLOCK, HashedFile, Hashing
from fope_export.model import assembly
from fope_export.model.assembly import Weights
from fope_export.model.checkpoint import load_checkpoint, open_checkpoint
from fope_export.model.conversion import ConvertedWeights
from fope_export.parity.localize import different_tensors
from tests.conftest import small_decoder, write_native
from tests.model.hugging_face import config_of, tensors_of, write

HEAD = "lm_head.weight"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are made in pieces of a few rows."""
    monkeypatch.setattr(assembly, "PIECE", 200)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama_tied_bias", "intern_dense"])
def test_pieces_make_what_the_whole_is(name: str, small_pieces: None, tmp_path: Path) -> None:
    weights = open_checkpoint(write(tmp_path, config_of(name), tensors_of(name))).weights
    several = []
    for tensor in weights.names:
        pieces = [*weights.pieces(tensor)]
        assert torch.equal(torch.cat(pieces), weights.whole(tensor)), tensor
        several += [tensor] if len(pieces) > 1 else []
    assert {"embed.weight", "layers.0.attention.att_proj.weight"} <= {*several}
    assert ("layers.0.feed_forward.proj" in several) == (name == "qwen3_moe")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_is_written_is_the_converted_decoder(dtype: Any, small_pieces: None, tmp_path: Path) -> None:
    config = ExportConfig(dtype=dtype)
    source = write(tmp_path / "in", config_of("qwen3_moe"), tensors_of("qwen3_moe"))
    made = export(source, tmp_path / "out", config)
    assert different_tensors(made, load_checkpoint(source).model.converted(config)) == []


def test_nothing_larger_than_a_piece_is_made_on_the_way(small_pieces: None, tmp_path: Path) -> None:
    weights = ConvertedWeights(
        open_checkpoint(write_native(small_decoder(), tmp_path / "in")), ExportConfig(dtype="fp16")
    )
    sizes = [piece.numel() for piece in weights.pieces(HEAD)]
    assert max(sizes) <= 200 and sum(sizes) == 256 * 64


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_that_is_stored_makes_no_other_numbers(
    stored: torch.dtype, small_pieces: None, tmp_path: Path
) -> None:
    write_native(small_decoder(), tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors[HEAD] *= 1.2345
    as_stored = {name: x if ".rotary." in name else x.to(stored) for name, x in tensors.items()}
    save_file(as_stored, tmp_path / "in/model.safetensors")
    source = open_checkpoint(tmp_path / "in")
    for dtype in ("fp32", "fp16", "bf16"):
        config = ExportConfig(dtype=dtype)
        got = torch.cat([*ConvertedWeights(source, config).pieces(HEAD)])
        wanted = load_checkpoint(tmp_path / "in").model.converted(config).lm_head.weight
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def spoilt(folder: Path, *numbers: tuple[int, float]) -> Path:
    """A checkpoint with other numbers in some rows of its head."""
    model = small_decoder()
    for row, number in numbers:
        model.lm_head.weight[row, 0] = number
    return write_native(model, folder)


def test_what_is_not_finite_is_named_before_anything_stands(small_pieces: None, tmp_path: Path) -> None:
    source = spoilt(tmp_path / "in", (255, float("nan")))
    assert open_checkpoint(source).outline
    for act in (lambda: export(source, tmp_path / "out"), lambda: load_checkpoint(source)):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN or infinity"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_does_not_fit_is_told_by_the_largest_of_all_pieces(small_pieces: None, tmp_path: Path) -> None:
    source = spoilt(tmp_path / "in", (0, 1e5), (255, -2e5))
    with pytest.raises(ExportError, match=r"lm_head\.weight reaches 200000, and float16 ends at 65504"):
        export(source, tmp_path / "out", ExportConfig(dtype="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_each_weight_is_read_once_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, pieces = list[str](), Weights.pieces

    def counted(self: Weights, name: str) -> Iterator[Tensor]:
        read.append(name)
        return pieces(self, name)

    monkeypatch.setattr(Weights, "pieces", counted)
    monkeypatch.setattr(Weights, "whole", lambda self, name: torch.cat([*pieces(self, name)]))
    source = open_checkpoint(write_native(small_decoder(), tmp_path / "in"))
    export(source.path, tmp_path / "out")
    matrices = [name for name, shape in source.weights.shapes.items() if len(shape) == 2]
    assert sorted(read) == sorted(matrices)


def test_hashes_of_what_is_read_and_of_what_is_written(tmp_path: Path) -> None:
    content = [bytes(range(256)) * 5000, b"", b"end"]
    with (tmp_path / "one").open("wb") as stream:
        file = HashedFile(stream)
        for each in content:
            file.write(each)
    wanted = hashlib.sha256(b"".join(content)).hexdigest()
    assert file.hexdigest() == wanted and file.size == (tmp_path / "one").stat().st_size
    with Hashing([tmp_path / "one"]) as hashes:
        assert hashes() == {"one": wanted}
    with pytest.raises(FileNotFoundError), Hashing([tmp_path / "two"]):
        pass


def test_hashing_stays_a_little_ahead_and_ends_with_its_block(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10 * BLOCK))
    with Hashing([tmp_path / "file"], ahead=BLOCK) as hashes:
        for done in (0, 2, 5):
            hashes.follow(done, 10)
            assert read_by(hashes, (done + 1) * BLOCK) == (done + 1) * BLOCK
        assert hashes() == {"file": hashlib.sha256(bytes(10 * BLOCK)).hexdigest()}
    with Hashing([tmp_path / "file"], ahead=BLOCK) as hashes:
        read_by(hashes, BLOCK)
    assert hashes.read == BLOCK


def read_by(hashes: Hashing, least: int) -> int:
    """What was read a moment after it is as much."""
    deadline = time.monotonic() + 10
    while hashes.read < least and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    return hashes.read


def test_one_tensor_is_made_ahead_and_no_more() -> None:
    made = list[int]()

    def lazy(number: int) -> ir.LazyTensor:
        def make() -> ir.TensorProtocol:
            made.append(number)
            return ir.Tensor(np.full(3, number, np.float32))

        return ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape([3]), name=str(number))

    plain = ir.Tensor(np.zeros(3, np.float32))
    tensors = one_ahead([lazy(0), lazy(1), plain, lazy(3), lazy(4)])
    for place, number in enumerate((0, 1, 0, 3, 4)):
        assert next(tensors).numpy()[0] == number
        time.sleep(0.05)
        assert max(made) <= place + 1
    assert made == [0, 1, 3, 4] and not [*tensors] and not [*one_ahead([])]
