"""Text to tokens and back, through the tokenizer files that travel with a model, as transformers does it."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fope_export import documents
from fope_export.config import tokens_of
from fope_export.errors import BundleError, ConfigError, cut

GENERATION = "generation_config.json"
UNREADABLE = "\ufffd"
"""What stands for bytes that are no text."""
CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What transformers replaces, in this order, where tokenizer_config.json has `clean_up_tokenization_spaces`."""
REACH = 6
"""Characters after a space that may still join it in a replacement of CLEANED, or in two of them."""


def byte_tokenizer() -> tokenizers.Tokenizer:
    """256 tokens: a byte's value is its id. Bytes that are no valid UTF-8 decode to the replacement character."""
    tokenizer = tokenizers.Tokenizer(models.BPE(_byte_vocabulary(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_vocabulary() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: a printable Latin-1 byte stands for itself, the others follow 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}


BYTES = _byte_vocabulary()
"""Byte-level BPE's letter for a byte -> the byte."""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of the bundle, empty where there is none. Raises BundleError where it is something else."""
    return documents.read_object(path, raises=BundleError, hint="Copy the file again.") if path.exists() else {}


class Tokenizer:
    """The tokenizer of the bundle or checkpoint in `folder`; `ends` are the tokens that end a text. Padding and
    truncation that were left switched on in tokenizer.json are ignored, as transformers ignores them.

    Raises BundleError when the folder has no tokenizer, or one that cannot be read, and ConfigError when
    generation_config.json names what are no token ids.

    >>> import fope_export as fx
    >>> text = fx.Tokenizer("out")
    >>> text.encode("FoPE"), text.decode([70, 111, 80, 69])
    ([70, 111, 80, 69], 'FoPE')
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise BundleError(
                f"{folder} has no tokenizer.json, so it takes and gives token ids only",
                hint="Use --prompt-ids, or put the tokenizer.json beside the checkpoint and export again.",
            )
        documents.check_file(path, raises=BundleError)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as cause:  # the library raises bare Exceptions
            raise BundleError(f"{path}: not a tokenizer: {cut(cause)}", hint="Export the checkpoint again.") from cause
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.config = read_object(folder / "tokenizer_config.json")
        self.ends = ends_of(folder)
        self._cleans = self.config.get("clean_up_tokenization_spaces") is True
        added = self.tokenizer.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        self._decoder = _decoder_of(self.tokenizer)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a prompt; with `special` also those that the tokenizer puts around every text.

        Raises ConfigError where it holds half a surrogate pair, which is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as cause:
            raise ConfigError(
                f"the prompt is no text: {text[cause.start]!a} at character {cause.start + 1}",
                hint="Is it UTF-8? A character beyond 65535 must have both halves in JSON.",
            ) from cause
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def bytes_of(self, token: int) -> bytes:
        """What a token alone is in UTF-8, which need not be whole characters; of a special token its name."""
        name = self.tokenizer.id_to_token(token)
        if name is None or token in self._special:
            return (name or "").encode()
        if _is_byte(name) and "ByteFallback" in self._decoder:
            return bytes([int(name[3:5], 16)])
        if "ByteLevel" in self._decoder:
            return bytes(BYTES[letter] if letter in BYTES else ord(letter) & 255 for letter in name)
        return str(self.tokenizer.decode([token], skip_special_tokens=False)).encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without that of special tokens."""
        stream = self.stream()
        return "".join((*(stream.push(token) for token in ids), stream.flush()))

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """A decoder for tokens that arrive one by one; its text ends before any of the strings `stop`. Raises
        ConfigError where one of these is empty.
        """
        in_runs = "ByteFallback" in self._decoder
        return TextStream(self.tokenizer, stop, special=self._special, in_runs=in_runs, cleans=self._cleans)


def ends_of(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text by generation_config.json in `folder`; none where it is silent, or not there.

    Raises ConfigError where they are no token ids.
    """
    path = folder / GENERATION
    ends = read_object(path).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(type(token) is not int or token < 0 for token in listed):
        raise ConfigError(
            f"{path}: eos_token_id is {cut(ends)}, expected a token id or a list of them",
            hint="Null means none.",
        )
    return tokens_of(listed)


class TextStream:
    """Text of tokens as they arrive; all pieces together are the tokens decoded at once.

    Text is held back while the tokens to come may change it: an unfinished character, bytes of a byte-fallback
    tokenizer (what one run of them means shows at its end), spaces that a clean-up may remove, and what may be the
    beginning of a stop string. Special tokens are not text, but a stop string may have them.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        stop: Sequence[str],
        *,
        special: dict[int, str],
        in_runs: bool,
        cleans: bool = False,
    ) -> None:
        if not all(stop):
            raise ConfigError("a stop string is empty", hint="Leave it out, or give the text that ends the answer.")
        self._tokenizer, self._stop, self._special = tokenizer, stop, special
        self._in_runs = in_runs
        self._ids: list[int] = []
        self._start, self._read = 0, 0
        self._cleaner = _Cleaner() if cleans else None
        self._held: list[tuple[str, bool]] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with `token`; ends before a stop string, after which `stopped` is true."""
        if (name := self._special.get(token)) is not None:
            self._hold(name, shown=False)
        elif self._tokenizer.id_to_token(token) is not None:
            self._ids.append(token)
            self._hold(self._decoded(last=False))
        return self._certain()

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        self._hold(self._decoded(last=True), last=True)
        certain = self._certain()
        return certain if self.stopped else certain + self._take(len(self._held))

    def _decoded(self, *, last: bool) -> str:
        """What the tokens that were not read yet add to the text before them, or nothing while that is open.

        Decoders treat the first token of a text differently, so that the new ones are decoded behind some old ones.
        """
        if not last and self._in_runs and _is_byte(self._tokenizer.id_to_token(self._ids[-1])):
            return ""
        before = self._tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=False)
        whole = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=False)
        if not last and (whole.endswith(UNREADABLE) or not whole.startswith(before)):
            return ""
        if whole != before:
            self._start, self._read = self._read, len(self._ids)
        return str(whole[len(before) :])

    def _hold(self, text: str, *, shown: bool = True, last: bool = False) -> None:
        if shown and self._cleaner:
            text = self._cleaner.push(text, last=last)
        self._held += [(letter, shown) for letter in text]

    def _certain(self) -> str:
        held = "".join(letter for letter, _ in self._held)
        if stops := [at for stop in self._stop if (at := held.find(stop)) >= 0]:
            self.stopped = True
            return self._take(min(stops))
        ends = (n for stop in self._stop for n in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:n]))
        return self._take(len(held) - max(ends, default=0))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return "".join(letter for letter, shown in taken if shown)


def _decoder_of(tokenizer: tokenizers.Tokenizer) -> str:
    return json.dumps(json.loads(tokenizer.to_str()).get("decoder"))


def _is_byte(token: str) -> bool:
    """Whether a token is one of byte fallback's, <0x00> to <0xFF>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


class _Cleaner:
    """The clean-up of transformers, on text that arrives in pieces: what may still join a replacement waits."""

    def __init__(self) -> None:
        self._open = ""

    def push(self, text: str, *, last: bool) -> str:
        self._open += text
        at = len(self._open) if last else self._settled()
        text, self._open = self._open[:at], self._open[at:]
        for old, new in CLEANED:
            text = text.replace(old, new)
        return text

    def _settled(self) -> int:
        """Where to cut so that no replacement meets the cut: all begin with a space. One before an apostrophe's other
        space, or before "n" or a space that such an apostrophe may join, belongs to what follows it.
        """
        text = self._open
        if " " not in text[-REACH:]:
            return len(text)
        for at in range(len(text) - 1, 0, -1):
            if text[at] == " " != text[at - 1] and text[max(at - 2, 0) : at] not in (" '", " n"):
                return at
        return 0
