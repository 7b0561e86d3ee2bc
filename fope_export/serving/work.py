"""A request that has a slot of an engine."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fope_export.serving.lookup import Lookup
from fope_export.serving.requests import Handle
from fope_export.serving.sampling import Draw


@dataclass(eq=False)
class Work:
    """A request in a slot."""

    handle: Handle
    slot: int
    fed: int = 0
    """Tokens of its prompt that are in the slot."""
    logits: NDArray[Any] | None = None
    """[V], after the last token that was fed, once the prompt is."""
    made: Counter[int] = field(default_factory=Counter)
    """How often each token is in the answer."""
    count: int = 0
    """Tokens of the answer."""
    last: int = 0
    """The answer's newest token, which was not fed yet."""
    lookup: Lookup = field(default_factory=Lookup)
    """What its text says about what comes."""

    @cached_property
    def seen(self) -> NDArray[np.int64]:
        """The prompt's tokens, each once."""
        return np.unique(self.handle.request.prompt)

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self.handle.request.sampling.max_new_tokens - self.count

    def draw(self, size: int) -> Draw:
        """What its next token, of a vocabulary of `size`, depends on."""
        request = self.handle.request
        allowed = request.grammar.allowed() if request.grammar else None
        if self.count < request.sampling.min_new_tokens and request.ends:
            allowed = np.ones(size, np.bool_) if allowed is None else allowed
            if (longer := allowed & ~np.isin(np.arange(size), list(request.ends))).any():
                allowed = longer
        place = len(request.prompt) + self.count
        return Draw(request.sampling, place, request.choice, self.seen, self.made, allowed)
