"""What commands print as JSON, held to its documented schema."""

import json
from typing import Any

import jsonschema_rs

from fope_export.records import schema


def held(name: str, text: str | bytes) -> Any:
    """The document that a command printed. Fails where it is not as `schema` says, or has a key that this lacks."""
    closed = schema(name)
    for each in (closed, *closed.get("$defs", {}).values()):
        if "properties" in each:
            each["additionalProperties"] = False
    document = json.loads(text)
    jsonschema_rs.validate(closed, document)
    return document
