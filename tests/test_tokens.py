import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from fope_export.errors import BundleError, ConfigError
from fope_export.tokens import Tokenizer, byte_tokenizer, ends_of


@pytest.fixture
def text(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return Tokenizer(tmp_path)


def test_a_byte_is_its_id(text: Tokenizer) -> None:
    everything = bytes(range(256)).decode("latin-1")
    assert text.encode(everything) == list(everything.encode())
    assert text.tokenizer.get_vocab_size() == 256


def test_characters_of_several_bytes_come_whole(text: Tokenizer) -> None:
    stream = text.stream()
    pieces = [stream.push(byte) for byte in "aé€b".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "b"]


def test_what_may_become_a_stop_string_is_held_back(text: Tokenizer) -> None:
    stream = text.stream(["END"])
    pieces = [stream.push(byte) for byte in b"xENyE"]
    assert pieces == ["x", "", "", "ENy", ""]
    assert (stream.flush(), stream.stopped) == ("E", False)
    pieces = [stream.push(byte) for byte in b"aEND"]
    assert (pieces[-1], stream.stopped, stream.flush()) == ("", True, "")


def test_the_first_of_several_stop_strings_counts(text: Tokenizer) -> None:
    stream = text.stream(["bcd", "ab"])
    assert "".join(stream.push(byte) for byte in b"xxab") == "xx" and stream.stopped


def test_a_missing_or_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="not a tokenizer"):
        Tokenizer(tmp_path)


def test_an_unfinished_character_at_the_end_is_told(text: Tokenizer) -> None:
    stream = text.stream()
    assert [stream.push(byte) for byte in "🙂".encode()[:3]] == ["", "", ""] and stream.flush() == "\ufffd"
    assert text.decode(b"a\xffb\xc3\xa9\xe2") == "a\ufffdbé\ufffd"


@pytest.fixture
def marked(tmp_path: Path) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    return Tokenizer(tmp_path)


@pytest.mark.parametrize("stop", ["<|end|>", "b<|end|>", "<|end|>\n", "d|>\nx"])
def test_a_stop_string_may_be_or_have_a_special_token(stop: str, marked: Tokenizer) -> None:
    stream = marked.stream([stop])
    pieces = [stream.push(token) for token in (*b"ab", 256, *b"\nxy")]
    wanted = {"<|end|>": "ab", "b<|end|>": "a", "<|end|>\n": "ab", "d|>\nx": "ab"}[stop]
    assert stream.stopped and "".join(pieces) + stream.flush() == wanted
    assert marked.decode((*b"ab", 256, *b"c")) == "abc"


def test_an_empty_stop_string_is_misuse(text: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="stop string is empty"):
        text.stream(["x", ""])


@pytest.mark.parametrize("prompt", ["A\ud83d", "caf\udce9"], ids=ascii)
def test_half_a_character_is_no_prompt(prompt: str, text: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no text"):
        text.encode(prompt)


@pytest.mark.parametrize(
    ("said", "ends"),
    [("{}", ()), ('{"eos_token_id": null}', ()), ('{"eos_token_id": []}', ()), ('{"eos_token_id": 7}', (7,)),
     ('{"eos_token_id": [7, 9, 7]}', (7, 9))],
)  # fmt: skip
def test_tokens_that_end_a_text(said: str, ends: tuple[int, ...], tmp_path: Path) -> None:
    assert ends_of(tmp_path) == ()
    (tmp_path / "generation_config.json").write_text(said)
    assert ends_of(tmp_path) == ends


@pytest.mark.parametrize("said", ['"x"', "true", "[1.5]", "-1", "[[1]]", "{}"])
def test_what_is_no_token_is_told(said: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": json.loads(said)}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        ends_of(tmp_path)
