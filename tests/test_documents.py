"""The door for documents: what is no document ends in one short message, and nothing hangs or recurses."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fope_export.documents import (
    DEPTH,
    read_bytes,
    read_json,
    read_json_lines,
    read_object,
    read_record,
    read_text,
    read_yaml,
)
from fope_export.errors import MESSAGE, CheckpointError, DocumentError, FopeError, cut


class Record(msgspec.Struct, forbid_unknown_fields=True):
    number: int = 0


JSON = {
    "deep": (b"[" * 200_000, "nested deeper"),
    "one level too deep": (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "nested deeper"),
    "surrogate": (rb'{"a": "\ud800"}', r"\\ud800.* has half of a surrogate pair"),
    "surrogate as key": (rb'{"\udfff": 1}', "has half of a surrogate pair"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "infinity": (b"-Infinity", "-Infinity is not"),
    "too large": (b"[1e999]", "more than a number can be"),
    "too many digits": (b"1" * 5000, "an integer of 5000 digits"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "is not UTF-8: byte 7 is 0xe9"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    "no end": (b'{"a": ', "not valid JSON"),
    "lists without end": (b"[" + b"[]," * 5_000_000 + b"[]]", "5,000,002 parts, expected"),
    "nothing": (b"", "not valid JSON"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a pointer of git-lfs"),
}


@pytest.mark.parametrize("kind", JSON)
def test_what_is_no_json_is_refused(kind: str, tmp_path: Path) -> None:
    path, (content, message) = tmp_path / "a.json", JSON[kind]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path, raises=CheckpointError)
    assert str(path) in str(caught.value) and caught.value.hint and len(str(caught.value)) < MESSAGE


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'\xef\xbb\xbf{"a": [1, -2.5e3, null, true, "\\ud83d\\ude00"]}', {"a": [1, -2500.0, None, True, "😀"]}),
        (
            b'{"model_max_length": 1000000000000000019884624838656}',
            {"model_max_length": 1000000000000000019884624838656},
        ),
        (b"[" * DEPTH + b"]" * DEPTH, None),
    ],
    ids=["byte order mark", "no limit", "deepest"],
)
def test_what_is_json_is_read(content: bytes, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert value is None or read_json(tmp_path / "a.json") == value


YAML = {
    "deep": (b"[" * 5_000, "nested deeper"),
    "twice": (b"model:\n  a: 1\n  a: 2\n", "'a' is given twice"),
    "references": (b"a: &x [1]\nb: [*x, *x]\n", "line 2 refers to another place"),
    "surrogate": (rb'a: "\ud800"', "surrogate"),
    "code": (b"a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    "no date": (b"a: 2024-13-45", "not valid YAML"),
    "lists without end": (b"[" + b"[]," * 30_000 + b"[]]", "parts, expected"),
    "no integer": (b'a: !!int ""', "not valid YAML"),
    "no boolean": (b"a: !!bool maybe", "not valid YAML"),
    "no time": (b"a: !!timestamp soon", "not valid YAML"),
    "digits": (b"a: " + b"1" * 4000, "an integer of"),
    "a long name": (b"a: *" + b"x" * 100_000, "line 1 refers"),
    "a byte that is no text": (b"a: \x00", "not valid YAML"),
}


@pytest.mark.parametrize("kind", YAML)
def test_what_is_no_yaml_is_refused(kind: str, tmp_path: Path) -> None:
    path, (content, message) = tmp_path / "a.yaml", YAML[kind]
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        read_yaml(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipe, "is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b"x" * 101), "is longer than 100 bytes"),
    ],
    ids=["pipe", "device", "folder", "loop", "missing", "long"],
)
def test_only_regular_files_are_opened(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(DocumentError, match=message):
        read_bytes(tmp_path / "a", most=100)


def test_lines_end_at_line_feeds_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"a\u2028b"\n\n"c\x85d"\n', newline="")
    assert read_json_lines(path) == ["a\u2028b", "c\x85d"]
    path.write_text('"a"\n\n{')
    with pytest.raises(DocumentError, match="line 3: not valid JSON"):
        read_json_lines(path)


def test_text_and_records(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"number": 3}')
    assert read_text(path) == '{"number": 3}'
    assert read_record(path, Record).number == 3
    path.write_text(f'{{"{"x" * 5000}": 1}}')
    with pytest.raises(DocumentError, match="unknown field `xxx") as caught:
        read_record(path, Record)
    assert len(str(caught.value)) < 600
    path.write_text("[]")
    with pytest.raises(DocumentError, match="expected a JSON object, found list"):
        read_object(path)


def test_a_message_is_never_long_and_never_moves_the_cursor() -> None:
    error = FopeError("a" * 100_000 + "\x1b[2J\ud800", hint="b" * 100_000)
    assert len(str(error)) <= MESSAGE and len(error.hint) < MESSAGE and str(error).endswith(r"\x1b[2J\ud800")
    assert len(cut("\ud800" * 300)) <= 200 and cut("né\n") == "né\n"
