"""The server's description of itself: OpenAPI 3.1, made of the classes that requests are read with."""

from collections.abc import Iterable
from typing import Any

import msgspec

from fope_export.serving import protocol

REQUESTS = {
    "/v1/completions": (protocol.Completion, "Continue prompts."),
    "/v1/chat/completions": (protocol.Chat, "Answer messages, where the model has a chat template."),
    "/tokenize": (protocol.Tokenize, "Text to token ids."),
    "/detokenize": (protocol.Detokenize, "Token ids to text."),
}
"""Path of a POST -> what it takes, and what it is for."""
READABLE = {
    "/v1/models": "The models that may be asked.",
    "/metrics": "For Prometheus.",
    "/health/live": "200 while every engine's heart beats, else 503.",
    "/health/ready": "200 where a request would be answered, else 503.",
}
"""Path of a GET -> what it is for."""
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def description(version: str, models: Iterable[str]) -> dict[str, Any]:
    """The document that /openapi.json is, for a server of some models."""
    kinds = [kind for kind, _ in REQUESTS.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for schema in components.values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": [*models]}
    wrong = {"description": "What is wrong.", "content": {"application/json": {"schema": ERROR}}}
    paths: dict[str, Any] = {}
    for (path, (_, summary)), schema in zip(REQUESTS.items(), schemas, strict=True):
        answers: dict[str, Any] = {"application/json": {}} | (
            {"text/event-stream": {}} if path.startswith("/v1") else {}
        )
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        told = {"200": {"description": "The answer.", "content": answers}, "4XX": wrong, "5XX": wrong}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": told}}
    for path, summary in READABLE.items():
        told = {"200": {"description": "As it says."}, "4XX": wrong, "503": {"description": "Not now."}}
        paths[path] = {"get": {"summary": summary, "responses": told}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fope-export", "version": version, "description": "OpenAI's API for models with FoPE."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }
