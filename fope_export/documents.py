"""The one door for documents from outside: bytes, text, JSON, JSON Lines and YAML, held to bounds before they are used.

A document is a regular file (what waits or never ends is not opened), no longer than `most` bytes, UTF-8 with or
without a byte order mark, nested no deeper than DEPTH, without lone surrogates, without a key given twice, and with
numbers that a computer has. What it says is checked by whoever knows what it should say.

Every reader takes the class of error to raise and the next step as `raises` and `hint`.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import yaml

from fope_export.errors import DocumentError, FopeError, cut

TEXT = 16 << 20
"""Bytes of a document at most, where nobody says: a configuration, a manifest, a report."""
LISTING = 64 << 20
"""Bytes at most of what grows with a model: the index of its weights, its tokenizer."""
YAML = 2 << 20
"""Bytes of YAML at most."""
PARTS, YAML_PARTS = 4 << 20, 30_000
"""Signs at most that begin a list, a mapping, or one of its values: each takes a few hundred bytes of memory, and in
YAML a fifth of a millisecond.
"""
LINES = 1 << 20
"""Of a file with a JSON value each, at most."""
DEPTH = 64
DIGITS = 40
"""Of an integer at most; Hugging Face writes 10 ** 30 for no limit."""
COMPLETE = "Is the file complete, and the one that was meant?"
POINTER = b"version https://git-lfs.github.com/spec/"
PULL = "It was cloned without git-lfs: run `git lfs install; git lfs pull` where it came from."
T = TypeVar("T")


def read_bytes(path: Path, *, most: int = TEXT, raises: type[FopeError] = DocumentError, hint: str = COMPLETE) -> bytes:
    """The contents of a regular file of at most `most` bytes.

    Raises `raises` where it is missing, no regular file, longer, or the pointer that git-lfs leaves in its place.
    """
    check_file(path, raises=raises, hint=hint)
    try:
        content = _first(path, most + 1)
    except OSError as cause:
        raise raises(f"{path} cannot be read: {cause.strerror or cause}", hint=hint) from cause
    if len(content) > most:
        raise raises(f"{path} is longer than {most:,} bytes, expected a document", hint=hint)
    return content


def check_file(path: Path, *, raises: type[FopeError] = DocumentError, hint: str = COMPLETE) -> int:
    """The size in bytes of a regular file that is no git-lfs pointer; nothing else is opened.

    Raises `raises` with what lies there instead.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise raises(f"{path} is {_kind(status.st_mode)}, expected a file", hint=hint)
        start = _first(path, len(POINTER))
    except (OSError, ValueError) as cause:  # ValueError: a null character in the name
        raise raises(f"{path} cannot be read: {getattr(cause, 'strerror', cause)}", hint=hint) from cause
    if start == POINTER:
        raise raises(f"{path} is a pointer of git-lfs and not the file itself", hint=PULL)
    return status.st_size


def _first(path: Path, count: int) -> bytes:
    """The first bytes of a file; what became a pipe since it was looked at does not wait."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        return stream.read(count)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_text(path: Path, *, most: int = TEXT, raises: type[FopeError] = DocumentError, hint: str = COMPLETE) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises `raises` where it is none, as for `read_bytes`."""
    return decoded(read_bytes(path, most=most, raises=raises, hint=hint), str(path), raises=raises)


def decoded(content: bytes, where: str, *, raises: type[FopeError]) -> str:
    """Text that came from `where` in UTF-8, without its byte order mark. Raises `raises` where it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        what = f"byte {cause.start} is {content[cause.start]:#04x}"
        raise raises(f"{where} is not UTF-8: {what}", hint="Save it again as UTF-8.") from cause


def read_json(path: Path, *, most: int = TEXT, raises: type[FopeError] = DocumentError, hint: str = COMPLETE) -> Any:
    """What a JSON file says. Raises `raises` with the place of the first thing that is wrong."""
    text = read_text(path, most=most, raises=raises, hint=hint)
    return _parsed(text, str(path), raises=raises, hint=hint)


def parse_json(content: bytes, where: str, *, raises: type[FopeError] = DocumentError, hint: str = COMPLETE) -> Any:
    """The same of bytes that are in memory, of bounded size; messages begin with `where`."""
    return _parsed(decoded(content, where, raises=raises), where, raises=raises, hint=hint)


def read_object(
    path: Path, *, most: int = TEXT, raises: type[FopeError] = DocumentError, hint: str = COMPLETE
) -> dict[str, Any]:
    """The object in a JSON file. Raises `raises` as for `read_json`, and where it is something else."""
    document = read_json(path, most=most, raises=raises, hint=hint)
    if not isinstance(document, dict):
        raise raises(f"{path}: expected a JSON object, found {type(document).__name__}", hint=hint)
    return document


def read_json_lines(path: Path, *, raises: type[FopeError] = DocumentError, hint: str = COMPLETE) -> list[Any]:
    """A JSON value for each line that is not blank; lines end at a line feed and nowhere else.

    Raises `raises` with the number of the first line that is wrong.
    """
    text = read_text(path, raises=raises, hint=hint)
    if (count := text.count("\n")) > LINES:
        raise raises(f"{path} has {count:,} lines, expected {LINES:,} at most", hint=hint)
    lines = enumerate(text.split("\n"), 1)
    return [_parsed(line, f"{path}, line {i}", raises=raises, hint=hint) for i, line in lines if line.strip()]


def read_record(
    path: Path, to: type[T], *, most: int = TEXT, raises: type[FopeError] = DocumentError, hint: str = COMPLETE
) -> T:
    """A JSON file as the struct `to`. Raises `raises` naming the field, what was expected and what came."""
    return as_record(read_json(path, most=most, raises=raises, hint=hint), to, str(path), raises=raises, hint=hint)


def as_record(
    data: Any, to: type[T], where: str, *, raises: type[FopeError] = DocumentError, hint: str = COMPLETE
) -> T:
    """What a document says as the struct `to`. Raises `raises` as for `read_record`."""
    try:
        return msgspec.convert(data, to)
    except (msgspec.ValidationError, FopeError) as cause:
        raise raises(f"{where}: {cut(cause)}", hint=cause.hint if isinstance(cause, FopeError) else hint) from cause


def read_yaml(path: Path, *, raises: type[FopeError] = DocumentError, hint: str = COMPLETE) -> Any:
    """What a YAML file says: plain values, no references. Raises `raises` with the place of what is wrong."""
    text = read_text(path, most=YAML, raises=raises, hint=hint)
    _check_parts(text, "[{:,\n", YAML_PARTS, str(path), raises=raises, hint=hint)
    try:
        document = yaml.load(text, _PlainLoader)  # noqa: S506 (a SafeLoader that knows less)
    except RecursionError as cause:
        raise raises(f"{path}: nested deeper than {DEPTH}", hint=hint) from cause
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as cause:  # explicit tags raise the rest
        raise raises(f"{path}: not valid YAML: {cut(' '.join(str(cause).split()))}", hint=hint) from cause
    _check(document, str(path), raises=raises, hint=hint)
    return document


class _PlainLoader(yaml.SafeLoader):
    """References could make a short document endless, and of two equal keys one would be lost."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.line + 1} refers to another place; write out what stands there")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := _twice(keys):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {cut(twice)} is given twice")
        return super().construct_mapping(node, deep)


def _parsed(text: str, where: str, *, raises: type[FopeError], hint: str) -> Any:
    _check_parts(text, "[{:", PARTS, where, raises=raises, hint=hint)
    try:
        document = DECODER.decode(text)
    except RecursionError as cause:
        raise raises(f"{where}: nested deeper than {DEPTH}", hint=hint) from cause
    except ValueError as cause:
        raise raises(f"{where}: not valid JSON: {cut(cause)}", hint=hint) from cause
    _check(document, where, raises=raises, hint=hint)
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError(f"{cut(_twice(key for key, _ in pairs))} is given twice")
    return members


def _twice(keys: Iterable[str]) -> str:
    """A key that comes again, quoted; nothing where none does."""
    seen: set[str] = set()
    return next((repr(key) for key in keys if key in seen or seen.add(key)), "")  # type: ignore[func-returns-value]


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, expected {DIGITS} at most")
    return int(text)


def _number(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{cut(text)} is more than a number can be")
    return number


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_no_number
)


def _check_parts(text: str, signs: str, most: int, where: str, *, raises: type[FopeError], hint: str) -> None:
    """Raises `raises` before a short text becomes a large thing in memory."""
    if (count := sum(map(text.count, signs))) > most:
        raise raises(f"{where} has {count:,} parts, expected {most:,} at most", hint=hint)


def _check(document: Any, where: str, *, raises: type[FopeError], hint: str) -> None:
    """Depth, surrogates and size of integers, level by level; nothing here recurses."""
    level = [document]
    for _ in range(DEPTH + 1):
        if not level:
            return
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple):
                below += value
            elif isinstance(value, str) and not value.isascii() and _has_surrogate(value):
                raise raises(
                    f"{where}: {cut(ascii(value))} has half of a surrogate pair", hint="It is no Unicode text."
                )
            elif isinstance(value, int) and value.bit_length() > 4 * DIGITS:
                raise raises(f"{where}: an integer of {value.bit_length()} bits", hint=hint)
        level = below
    raise raises(f"{where}: nested deeper than {DEPTH}", hint=hint)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
