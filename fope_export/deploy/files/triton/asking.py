"""How `check` asks Triton."""

from collections.abc import Callable
from typing import Any

Ask = Callable[..., Any]
"""The JSON at a path, given a body or none."""


def be_ready(ask: Ask, model: str) -> None:
    """Raises OSError where the model is not."""
    ask(f"/v2/models/{model}/ready")


def answer(ask: Ask, model: str, prompt: str, max_tokens: int) -> str:
    """Greedily, to a prompt."""
    body = {"text_input": prompt, "max_tokens": max_tokens, "temperature": 0.0}
    return str(ask(f"/v2/models/{model}/generate", body)["text_output"])
