"""Passkey retrieval: digits that stand somewhere in a text which has nothing to do with them, and are asked for at its
end (Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300, section 4.2).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fope_export.errors import ParityError

Ids = NDArray[np.int64]
BEFORE, AFTER = " The pass key is", ". Remember it. "
"""What stands around it."""
QUESTION = " What is the pass key? The pass key is"
DIGITS = 5


class Passkey(NamedTuple):
    """A task: what is read, and what must come then."""

    prompt: Ids  # [S]
    answer: Ids  # [A]


def passkey(
    encode: Callable[[str], list[int]], text: Ids, length: int, depth: float, generator: np.random.Generator
) -> Passkey:
    """A task of `length` tokens with its answer, in a random part of `text` [N]; the key stands at `depth`, 0 at
    the beginning and 1 at the end.

    Raises ParityError where so many tokens have no room for it, or the text is shorter.
    """
    key = encode(" " + "".join(map(str, generator.integers(0, 10, DIGITS))))
    needle, question = [*encode(BEFORE), *key, *encode(AFTER)], encode(QUESTION)
    room = length - len(needle) - len(question) - len(key)
    if not 0 <= room < len(text):
        raise ParityError(
            f"a passkey in {length} tokens needs {length - room} of them, and the text has {len(text)}",
            hint="Give other --lengths, or more text in --data.",
        )
    start, at = int(generator.integers(0, len(text) - room)), round(depth * room)
    parts = (text[start : start + at], needle, text[start + at : start + room], question)
    return Passkey(np.concatenate(parts).astype(np.int64), np.asarray(key, np.int64))
