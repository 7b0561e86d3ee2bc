"""The door for ONNX files: tensors are whole and in the folder, and functions end."""

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.errors import BundleError
from fope_export.graph.reading import load_onnx, read_onnx
from fope_export.onnx_files import check_graphs

Spoil = Callable[[Path], object]


def external(**changes: str) -> Spoil:
    """Say something else about where the first external tensor lies."""

    def spoil(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        for entry in tensor.external_data:
            entry.value = changes.get(entry.key, entry.value)
        onnx.save(model, path)

    return spoil


def edited(change: Callable[[onnx.ModelProto], object]) -> Spoil:
    def spoil(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        change(model)
        onnx.save(model, path)

    return spoil


def call_itself(model: onnx.ModelProto) -> None:
    body = model.functions[0]
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node(body.name, body.input, ["again"], domain=body.domain)], "g", [], []
    )
    body.node.append(onnx.helper.make_node("If", ["condition"], ["again"], then_branch=inner, else_branch=inner))


def widened(model: onnx.ModelProto) -> None:
    next(tensor for tensor in model.graph.initializer if not tensor.external_data).dims[:] = [1 << 60]


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def data(path: Path) -> Path:
    return path.with_name("model.onnx.data")


def nested(path: Path) -> None:
    content = b""
    for _ in range(100):
        for field in (6, 5, 1):  # a graph in an attribute of a node of a graph
            content = bytes([field << 3 | 2]) + _varint(len(content)) + content
    path.write_bytes(bytes([7 << 3 | 2]) + _varint(len(content)) + content)


def _varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + _varint(number >> 7) if number > 127 else bytes([number])


def to_a_device(path: Path) -> None:
    data(path).unlink()
    data(path).symlink_to("/dev/zero")


REFUSED: dict[str, tuple[Spoil, str]] = {
    "above": (external(location="../moved"), r"lies in '\.\./moved', outside of the folder"),
    "below and above": (external(location="a/../../moved"), "outside of the folder"),
    "absolute": (external(location="/etc/passwd"), "outside of the folder"),
    "another system's": (external(location=r"C:\moved"), "outside of the folder"),
    "nowhere": (external(location=""), "outside of the folder"),
    "missing": (lambda path: data(path).unlink(), "No such file"),
    "short": (lambda path: os.truncate(data(path), 999), "which has 999, is to give"),
    "a device": (to_a_device, "is a device"),
    "far": (external(offset=str(1 << 60)), "is to give"),
    "negative": (external(offset="-8"), "is to give"),
    "another length": (external(length="8"), "is to give 8 from"),
    "no number": (external(length="all"), "has no place that can be read"),
    "shape without numbers": (edited(widened), "needs"),
    "unknown type": (edited(unknown_type), "unknown element type 99"),
    "function without end": (edited(call_itself), "calls itself"),
    "flipped": (lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]), "not a valid ONNX file"),
    "truncated": (lambda path: os.truncate(path, 3000), "not a valid ONNX file"),
    "empty": (lambda path: path.write_bytes(b""), "it has no graph"),
    "graphs in graphs": (nested, "not a valid ONNX file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_whole_onnx_file_is_refused(kind: str, spoilable: Bundle) -> None:
    spoil, message = REFUSED[kind]
    spoil(spoilable.model)
    for read in (read_onnx, load_onnx):
        with pytest.raises(BundleError, match=message) as caught:
            read(spoilable.model)
        assert str(caught.value).startswith(str(spoilable.model)) and caught.value.hint


def test_a_graph_has_the_manifests_inputs(spoilable: Bundle) -> None:
    check_graphs(spoilable)
    edited(lambda model: setattr(model.graph.input[3].type.tensor_type.shape.dim[1], "dim_value", 2))(spoilable.model)
    with pytest.raises(BundleError, match=r"past_key_values\.0\.key has sizes \[None, 2, None, 16\], and \[None, 4"):
        check_graphs(spoilable)


def test_a_link_to_the_data_is_read(spoilable: Bundle, tmp_path: Path) -> None:
    data(spoilable.model).rename(tmp_path / "blob")
    data(spoilable.model).symlink_to(tmp_path / "blob")
    assert read_onnx(spoilable.model).graph.node


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["optimize"], ["build", "--no-plugin"], ["run", "--prompt", "x"], ["validate", "--lengths", "5"]],
    ids=lambda command: command[0],
)
def test_every_command_names_the_file(
    command: list[str], spoilable: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    external(location="../moved")(spoilable.model)
    spoilable.add({"model.onnx": spoilable.model.read_bytes()})  # so that its hash fits
    name, *options = command
    path = spoilable.model if name == "inspect" else spoilable.path
    assert main([name, str(path), *options]) == 2
    told = capsys.readouterr().err
    assert "model.onnx: tensor" in told and "'../moved'" in told and "\nhint:  " in told and "Traceback" not in told
