"""OpenAI's requests, as this server takes them, and what is wrong with others.

Names and meanings follow OpenAI's API reference; `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`,
`stop_token_ids` and `structured_outputs` are vLLM's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from fope_export.config import Size
from fope_export.documents import parse_json
from fope_export.errors import ConfigError, FopeError, cut
from fope_export.serving.sampling import Penalty, Probability
from fope_export.serving.structured import ANY_OBJECT, Form

STOPS = 16
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], msgspec.Meta(max_length=STOPS)]
Top = Annotated[int, msgspec.Meta(ge=0, le=20)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
IGNORED = frozenset(("user", "metadata", "service_tier"))
"""Fields of a request that change nothing here."""
UNSUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": ("No model here is trained to call tools.", ([],)),
    "tool_choice": ("No model here is trained to call tools.", ("none", "auto")),
    "functions": ("No model here is trained to call functions.", ([],)),
    "function_call": ("No model here is trained to call functions.", ("none", "auto")),
    "suffix": ("No model here fills in the middle.", ("",)),
    "best_of": ("Ask for n answers, and choose.", (1,)),
}
"""Field -> why it is refused, and the values that ask for nothing."""


class RequestError(FopeError):
    """A request that gets an answer of another kind: an HTTP `status`, and the field `param` that is wrong, if one is.
    `fields` are told beside the message.
    """

    def __init__(
        self, message: str, *, hint: str = "", status: int = 400, param: str | None = None, code: str | None = None,
        **fields: Any,
    ) -> None:  # fmt: skip
        super().__init__(message, hint=hint)
        self.status, self.param, self.code, self.fields = status, param, code, fields

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API tells errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        text = f"{self}. {self.hint}" if self.hint else str(self)
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code, **self.fields}}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream also tells."""

    include_usage: bool | None = False


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schema with its name."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer has to be, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer has to be, in vLLM's words."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of requests have. None is the bundle's default, or OpenAI's."""

    model: str
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    n: Choices = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: list[Natural] = []
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]] = {}
    min_tokens: Size = 0
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    store: Literal[False] = False

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that an answer ends before."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def biases(self) -> dict[int, float]:
        """By token id."""
        try:
            return {int(token): bias for token, bias in self.logit_bias.items()}
        except ValueError as cause:
            raise RequestError(f"logit_bias names what is no token id: {cut(cause)}", param="logit_bias") from cause

    @property
    def form(self) -> Form | None:
        """What an answer has to be. Raises RequestError where two fields say it, or one says nothing."""
        forms = [*_of_format(self.response_format), *_of_outputs(self.structured_outputs)]
        if len(forms) > 1:
            raise RequestError("an answer cannot have several forms", param="structured_outputs")
        return forms[0] if forms else None


class Completion(Asked, frozen=True, kw_only=True):
    """A request to /v1/completions."""

    prompt: str | list[str | Natural | list[Natural]]
    max_tokens: Size | None = None
    logprobs: Top | None = None
    echo: bool = False

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each of them; an empty list is one empty prompt. Raises RequestError where they are of several kinds."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [each for each in self.prompt if isinstance(each, str)]
        lists = [each for each in self.prompt if isinstance(each, list)]
        ids = [each for each in self.prompt if isinstance(each, int)]
        if sum(map(bool, (texts, lists, ids))) > 1:
            raise RequestError("prompt: texts, ids and lists of ids are mixed", param="prompt")
        return texts or lists or [ids]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of what a message says."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True):
    """What every message of a chat has; templates may know more."""

    role: Annotated[str, msgspec.Meta(min_length=1)]
    content: str | list[Part]


class Chat(Asked, frozen=True, kw_only=True):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    max_completion_tokens: Size | None = None
    max_tokens: Size | None = None
    logprobs: bool = False
    top_logprobs: Top | None = None

    @property
    def plain(self) -> list[dict[str, Any]]:
        """The messages, in one text each. Raises RequestError where one has no role, or says what is no text."""
        try:
            read = [msgspec.convert(message, Message) for message in self.messages]
        except msgspec.ValidationError as cause:
            raise RequestError(f"messages: {cut(cause)}", param="messages") from cause
        texts = [m.content if isinstance(m.content, str) else "\n".join(part.text for part in m.content) for m in read]
        return [message | {"content": text} for message, text in zip(self.messages, texts, strict=True)]


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request to /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class Detokenize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request to /detokenize."""

    tokens: list[Natural]
    model: str | None = None


T = TypeVar("T", bound=msgspec.Struct)


def parse(body: bytes, kind: type[T]) -> T:
    """A request of a kind. Raises RequestError naming the field that is unknown, or of another type or size."""
    data = parse_json(body, "the body", raises=RequestError, hint="Send one JSON object.")
    if not isinstance(data, dict):
        raise RequestError(f"the body is {cut(json.dumps(data))}, expected an object")
    fields = {name: value for name, value in data.items() if value is not None and name not in IGNORED}
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name, (reason, nothing) in UNSUPPORTED.items():
        if name in fields and name not in known and (fields[name] is True or fields[name] not in nothing):
            raise RequestError(f"{name} is not supported", hint=reason, param=name, code="unsupported_parameter")
    fields = {name: value for name, value in fields.items() if name in known or name not in UNSUPPORTED}
    if unknown := sorted(fields.keys() - known):
        raise RequestError(
            f"there is no field {cut(unknown[0], 60)}", hint="Leave it out.", param=cut(unknown[0], 60),
            code="unknown_parameter",
        )  # fmt: skip
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as cause:
        message, _, path = str(cause).partition(" - at `$")
        name = path.strip(".`").partition(".")[0].partition("[")[0] or _missing(message)
        raise RequestError(f"{name + ': ' if name else ''}{cut(message)}", param=name or None) from cause


def _missing(message: str) -> str:
    """The field that is not there, by msgspec's message."""
    before, _, rest = message.partition("required field `")
    return rest.partition("`")[0] if "Object missing" in before else ""


def _of_format(asked: ResponseFormat | None) -> list[Form]:
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [ANY_OBJECT]
    if asked.json_schema is None:
        raise RequestError("response_format has no json_schema", param="response_format")
    return [Form("json_schema", json.dumps(asked.json_schema.schema))]


def _of_outputs(asked: StructuredOutputs | None) -> list[Form]:
    if asked is None:
        return []
    schema = asked.json if isinstance(asked.json, str) else None if asked.json is None else json.dumps(asked.json)
    named: Mapping[Literal["json_schema", "regex", "grammar"], str | None]
    named = {"json_schema": schema, "regex": asked.regex, "grammar": asked.grammar}
    forms = [Form(kind, text) for kind, text in named.items() if text is not None]
    if not forms:
        raise RequestError("structured_outputs says nothing", param="structured_outputs")
    return forms


def refused(cause: ConfigError, param: str | None = None) -> RequestError:
    """What a request asks for and the package does not take, as the server says it."""
    return RequestError(str(cause), hint=cause.hint, param=param)
