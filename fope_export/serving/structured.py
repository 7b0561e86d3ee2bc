"""Answers of a given form, JSON by a schema, a regular expression or a Lark grammar: llguidance says what may come."""

import json
from collections.abc import Collection
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fope_export.errors import ConfigError, cut, require
from fope_export.tokens import Tokenizer

LARGEST = 1 << 16
"""Characters of a schema, an expression or a grammar, at most."""
ITEMS, FUEL, STATES, SYMBOLS = 2_000, 1_000_000, 50_000, 100_000
"""Bounds on what one of them may make llguidance do: alternatives at once, work, states of its lexer, its own size."""


BLANK = " ?"
"""What may stand between the signs of JSON: a model that may write blanks without end does."""


class Form(NamedTuple):
    """What an answer has to be, in words."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    """The schema as JSON, a regular expression in Rust's syntax, or a grammar in Lark's."""


ANY_OBJECT = Form("json_schema", '{"type": "object"}')
"""Whatever is a JSON object."""


class Forms:
    """Compiles what answers have to be, for one tokenizer and a vocabulary of `size`, of which `ends` end a text.

    Raises BackendError where llguidance is not installed.
    """

    def __init__(self, text: Tokenizer, size: int, ends: Collection[int]) -> None:
        self._library, self._size = require("llguidance", "serve"), size
        self._tokenizer = self._library.LLTokenizer(
            text.tokenizer.to_str(), n_vocab=size, eos_token=sorted(ends) or None
        )

    def follow(self, form: Form) -> "Following":
        """What follows one answer. Raises ConfigError where the form is too large, or none."""
        if len(form.text) > LARGEST:
            raise ConfigError(
                f"{form.kind} has {len(form.text):,} characters, and at most {LARGEST:,} are taken", hint="Say less."
            )
        limits = self._library.LLParserLimits(
            max_items_in_row=ITEMS, initial_lexer_fuel=FUEL, max_lexer_states=STATES, max_grammar_size=SYMBOLS,
            verbose_errors=False,
        )  # fmt: skip
        matchers = self._library.LLMatcher
        makers = {
            "json_schema": partial(matchers.grammar_from_json_schema, defaults={"whitespace_pattern": BLANK}),
            "regex": matchers.grammar_from_regex,
            "grammar": matchers.grammar_from_lark,
        }
        try:
            if form.kind == "json_schema":
                json.loads(form.text)
            matcher = matchers(self._tokenizer, makers[form.kind](form.text), log_level=0, limits=limits)
            wrong = matcher.get_error() if matcher.is_error() else ""
        except (ValueError, RecursionError) as cause:
            wrong = str(cause)
        if wrong:
            raise ConfigError(
                f"{form.kind} cannot be followed: {cut(wrong)}", hint="Does it hold without the newest part?"
            )
        return Following(matcher, self._size)


class Following:
    """One answer and what may come next in it: a `Grammar` of the engine."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size, self.done = matcher, size, False

    def copy(self) -> "Following":
        """The same for another answer; nothing is compiled again."""
        return Following(self._matcher.deep_copy(), self._size)

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self.done = self._matcher.is_stopped()
