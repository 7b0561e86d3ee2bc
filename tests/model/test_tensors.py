"""The door for tensors: promises without bytes, tensors without numbers, and what stands in a file's place."""

import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fope_export.cli import main
from fope_export.errors import CheckpointError, ConfigError
from fope_export.model.tensors import read_array, read_tensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
WEIGHT = torch.arange(64.0).reshape(8, 8)


def pickled(value: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(value, folder / "model.pt")
        return folder / "model.pt"

    return write


def header(**fields: Any) -> Callable[[Path], Path]:
    """A safetensors file of 256 bytes of numbers, whose header says something else."""

    def write(folder: Path) -> Path:
        text = json.dumps({"w": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]} | fields}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(256))
        return folder / "model.safetensors"

    return write


def two_tensors(first: list[int], second: list[int]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        parts = {name: {"dtype": "U8", "shape": [to - at], "data_offsets": [at, to]} for name, (at, to) in
                 {"a": first, "b": second}.items()}  # fmt: skip
        text = json.dumps(parts).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(256))
        return folder / "model.safetensors"

    return write


def long_header(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    return folder / "model.safetensors"


def packed(folder: Path) -> Path:
    path = pickled({"w": WEIGHT})(folder)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, bytes(1 << 24) if name.endswith("data/0") else content)
    return path


def claimed(folder: Path) -> Path:
    path = pickled({"w": WEIGHT})(folder)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)
    return path


def pointer(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(POINTER)
    return folder / "model.safetensors"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def index(folder: Path) -> Path:
    (folder / "a.safetensors").mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    return folder / "model.safetensors.index.json"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a header longer than the file": (long_header, "cannot be read"),
    "a shape without bytes": (header(shape=[1 << 40, 8]), "cannot be read"),
    "offsets beyond the file": (header(data_offsets=[0, 1 << 40]), "cannot be read"),
    "overlapping": (two_tensors([0, 200], [100, 256]), "cannot be read"),
    "a gap": (two_tensors([0, 100], [200, 256]), "cannot be read"),
    "compressed": (packed, "is compressed"),
    "parts larger than the file": (claimed, r"its parts claim 2,147,\d+,\d+ bytes, the file has"),
    "meta": (pickled({"w": torch.empty(8, device="meta")}), "w holds no numbers: it is on device meta"),
    "expanded": (pickled({"w": torch.ones(1).expand(1 << 20, 1 << 20)}), "and 4 bytes for it"),
    "a long name": (pickled({"a." * 100_000: WEIGHT}), "a tensor is called a.a."),
    "sparse": (pickled({"w": WEIGHT.to_sparse()}), "w is torch.float32, torch.sparse_coo; expected dense"),
    "a pointer": (pointer, "is a pointer of git-lfs"),
    "a pipe": (pipe, "is a pipe, expected a file"),
    "a folder that an index names": (index, "is a folder, expected a file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_numbers_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(make(tmp_path))
    assert caught.value.hint and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [{"w": WEIGHT}, {"w": WEIGHT, "shared": WEIGHT, "turned": WEIGHT.T}, {"none": torch.zeros(0, 5)},
     {"one": torch.tensor(3.0)}],
    ids=["plain", "shared", "empty", "scalar"],
)  # fmt: skip
def test_what_holds_numbers_is_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    read, shards = read_tensors(pickled(tensors)(tmp_path))
    assert not shards and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62, 4), (-1,), (9,)])
def test_an_array_is_no_larger_than_its_file(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(8))
    np.testing.assert_array_equal(read_array(path, hint="h"), np.arange(8))
    path.write_bytes(path.read_bytes().replace(b"(8,)", f"{shape}".encode()))
    with pytest.raises(ConfigError, match=r"ids\.npy"):
        read_array(path, hint="h")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_is_named_before_anything_is_computed(
    name: str, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in native.iterdir():
        (folder / path.name).write_bytes(POINTER if path.name == name else path.read_bytes())
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"{name} is a pointer of git-lfs" in told and "git lfs pull" in told and "tracing" not in told


def test_a_configuration_cannot_promise_more_than_the_weights(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((native / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 4096, "hidden_size": 2**31 - 1}))
    save_file({"embed.weight": WEIGHT}, tmp_path / "model.safetensors")
    started = time.process_time()
    assert main(["inspect", str(tmp_path)]) == 2 and "missing" in capsys.readouterr().err
    assert time.process_time() - started < 20  # a decoder of 4,096 layers takes minutes
