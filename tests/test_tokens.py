from pathlib import Path

import pytest

from fope_export.errors import BundleError
from fope_export.tokens import Text, byte_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Text:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return Text(tmp_path)


def test_a_byte_is_its_id(text: Text) -> None:
    everything = bytes(range(256)).decode("latin-1")
    assert text.encode(everything) == list(everything.encode())
    assert text.tokenizer.get_vocab_size() == 256


def test_characters_of_several_bytes_come_whole(text: Text) -> None:
    stream = text.stream()
    pieces = [stream.push(byte) for byte in "aé€b".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "b"]


def test_what_may_become_a_stop_string_is_held_back(text: Text) -> None:
    stream = text.stream(["END"])
    pieces = [stream.push(byte) for byte in b"xENyE"]
    assert pieces == ["x", "", "", "ENy", ""]
    assert stream.flush() == "E" and not stream.stopped
    assert [stream.push(byte) for byte in b"aEND"][-1] == "" and stream.stopped and stream.flush() == ""


def test_the_first_of_several_stop_strings_counts(text: Text) -> None:
    stream = text.stream(["bcd", "ab"])
    assert "".join(stream.push(byte) for byte in b"xxab") == "xx" and stream.stopped


def test_a_missing_or_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        Text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="not a tokenizer"):
        Text(tmp_path)
