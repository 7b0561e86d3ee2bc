"""What the words of a command line may be. Each raises ArgumentTypeError where one is something else."""

import argparse
import re

from fope_export.errors import cut

DIGITS = re.compile(r"[0-9]{1,18}")


def guesses(text: str) -> str | int:
    """How many tokens are guessed: auto, off or a number."""
    if text in ("auto", "off"):
        return text
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{cut(text)!r} is neither auto nor off nor a number from 1 on") from None


def seconds(text: str) -> float:
    """A time."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def size(text: str) -> int:
    """Bytes, as 1048576, 512K, 256M or 2G."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not DIGITS.fullmatch(digits) or unit not in ("", "K", "M", "G"):
        raise argparse.ArgumentTypeError(f"{cut(text)!r} is no size, such as 512M or 2G")
    return int(digits) << (10 * ("", "K", "M", "G").index(unit))


def axis(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME=LEAST,BEST,LARGEST."""
    name, _, sizes = text.partition("=")
    return name, numbers(sizes)


def names(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(text.split(","))


def natural(text: str) -> int:
    """One whole number in decimal digits."""
    if not DIGITS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not one number from 0 on")
    return int(text)


def port(text: str) -> int:
    """Of TCP."""
    if (number := natural(text)) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is not one of 65,536 ports")
    return number


def positive(text: str) -> int:
    """A number from 1 on."""
    if not (number := natural(text)):
        raise argparse.ArgumentTypeError("0 is too few")
    return number


def bias(text: str) -> tuple[int, float]:
    """ID=BIAS."""
    token, _, bias = text.partition("=")
    try:
        return natural(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not ID=BIAS, like 42=-1.5") from None


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    parts = text.split(",")
    if not all(map(DIGITS.fullmatch, parts)):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a list of numbers from 0 on, like 1,64,512")
    return tuple(map(int, parts))
