"""Text to tokens and back, through the tokenizer file that travels with a model."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from fope_export.errors import BundleError


def byte_tokenizer() -> Tokenizer:
    """256 tokens: a byte's value is its id. Bytes that are no valid UTF-8 decode to the replacement character."""
    tokenizer = Tokenizer(models.BPE(_byte_vocabulary(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_vocabulary() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: a printable Latin-1 byte stands for itself, the others follow 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}


class Text:
    """A bundle's tokenizer. Raises BundleError when the folder has none."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BundleError(
                f"{folder} has no tokenizer.json, so it takes and gives token ids only",
                hint="Use --prompt-ids, or put the tokenizer.json beside the checkpoint and export again.",
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as cause:  # the library raises bare Exceptions
            raise BundleError(f"{path}: not a tokenizer: {cause}", hint="Export the checkpoint again.") from cause

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return list(self.tokenizer.encode(text).ids)

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """A decoder for tokens that arrive one by one."""
        return TextStream(self.tokenizer, stop)


class TextStream:
    """Text of tokens as they arrive. Text that may be the beginning of a stop string is held back until it is clear."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with `token`; ends before a stop string, after which `stopped` is true."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - self._uncertain())

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._take(len(self._held))

    def _uncertain(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        ends = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(ends, default=0)

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
