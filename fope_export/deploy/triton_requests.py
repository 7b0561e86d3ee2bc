"""What Triton asks of a model, in the tensors of its OpenAI frontend, and what it is told."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fope_export.deploy.base import shortest
from fope_export.errors import cut
from fope_export.serving.protocol import Completion, RequestError, parse

Tensors = Mapping[str, NDArray[Any]]
SAME = (
    "stream", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "ignore_eos",
)  # fmt: skip
"""Tensors [1, 1] that are called as OpenAI's and vLLM's fields."""
ID = "id"
"""What a client calls its request, which is told to it again."""
GUIDES = {"json_schema": "json", "regex": "regex", "lark_grammar": "grammar"}
"""Kinds of guides, and the fields of `structured_outputs` that they are."""


def asked(model: str, tensors: Tensors, parameters: Mapping[str, Any]) -> Completion:
    """The request that some tensors are; what else its JSON had comes as `parameters`, where a field may be, too.

    Raises RequestError naming what is wrong.
    """
    if unknown := sorted(parameters.keys() - {*SAME, "seed", ID}):
        raise RequestError(f"there is no parameter or tensor {cut(unknown[0], 60)}", hint="Leave it out.")
    fields = {name: value for name, value in parameters.items() if name != ID}
    fields |= {"model": model, "prompt": _text(tensors["text_input"])}
    fields |= {name: _number(tensors[name]) for name in SAME if name in tensors}
    if "seed" in tensors:
        fields["seed"] = int(tensors["seed"].item()) % (1 << 63)
    if "exclude_input_in_output" in tensors:
        fields["echo"] = not tensors["exclude_input_in_output"].item()
    if "stop_words" in tensors:
        fields["stop"] = [_decoded(each) for each in tensors["stop_words"].flat]
    if "guided_decoding_guide" in tensors:
        fields |= _guide(tensors)
    return parse(msgspec.json.encode(fields), Completion)


def _guide(tensors: Tensors) -> dict[str, Any]:
    kind = _text(tensors["guided_decoding_guide_type"]) if "guided_decoding_guide_type" in tensors else ""
    if kind not in GUIDES:
        raise RequestError(f"there is no guide of type {kind[:60]!r}", hint=f"One of: {', '.join(GUIDES)}.")
    return {"structured_outputs": {GUIDES[kind]: _text(tensors["guided_decoding_guide"])}}


def _number(tensor: NDArray[Any]) -> bool | int | float:
    value = tensor.item()
    return shortest(value) if isinstance(value, float) else value


def _text(tensor: NDArray[Any]) -> str:
    return _decoded(tensor.item())


def _decoded(text: bytes | str) -> str:
    """Raises RequestError for what is no text."""
    try:
        return text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as cause:
        raise RequestError(f"a text is not UTF-8: {cause.reason} at byte {cause.start}") from cause


def told(text: str, prompt_tokens: int, tokens: int, reason: str | None) -> dict[str, NDArray[Any]]:
    """A piece of an answer with the number of its tokens, and why it ended, in tensors [1, 1]."""
    return {
        "text_output": np.array([[text.encode()]], np.object_),
        "num_input_tokens": np.array([[prompt_tokens]], np.int32),
        "num_output_tokens": np.array([[tokens]], np.int32),
        "finish_reason": np.array([[(reason or "").encode()]], np.object_),
    }
