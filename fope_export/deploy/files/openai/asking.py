"""How `check` asks a server with OpenAI's API."""

from collections.abc import Callable
from typing import Any

Ask = Callable[..., Any]
"""The JSON at a path, given a body or none."""


def be_ready(ask: Ask, model: str) -> None:
    """Raises OSError where the server does not name the model."""
    names = [each["id"] for each in ask("/v1/models")["data"]]
    if model not in names:
        raise OSError(f"there is no model {model}, but {', '.join(names) or 'none'}")


def answer(ask: Ask, model: str, prompt: str, max_tokens: int) -> str:
    """Greedily, to a prompt."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return str(ask("/v1/completions", body)["choices"][0]["text"])
