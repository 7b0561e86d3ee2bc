"""Plain data as a configuration class, which is closed: what it does not know is refused, with what could be meant."""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from fope_export.errors import ConfigError, cut

T = TypeVar("T")
LISTED, NAMED = 8, 60
"""Unknown fields that a message lists, and characters of the name of one."""
INCOMPLETE = "Is the file complete, and of the version this program reads?"


def convert(
    data: Mapping[str, Any],
    to: type[T],
    *,
    where: str,
    strict: bool = True,
    hint: str = INCOMPLETE,
    meanings: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """`data` as the configuration class `to`; `strict=False` also takes numbers written as text. `meanings` says of
    fields that the class does not have what they do elsewhere.

    Raises ConfigError naming `where`, the field, what was expected and what came; all unknown fields at once.
    """
    if unknown := _unknown(data, to):
        listed = ", ".join(f"`{cut(name, NAMED)}`" for name in unknown[:LISTED])
        more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
        raise ConfigError(
            f"{where}: unknown field{'s' * (len(unknown) > 1)} {listed}{more}", hint=_meant(unknown, to, meanings)
        )
    try:
        return msgspec.convert(data, to, strict=strict)
    except msgspec.ValidationError as cause:
        message, _, path = str(cause).partition(" - at `$")
        field = path.strip(".`")
        raise ConfigError(f"{where}: {cut(field) + ': ' if field else ''}{cut(message)}", hint=hint) from cause
    except ConfigError as cause:
        raise ConfigError(f"{where}: {cause}", hint=cause.hint) from cause


def _unknown(data: Mapping[str, Any], to: type) -> list[str]:
    """The fields of `data` that a closed class does not have."""
    form = getattr(to, "__struct_config__", None)
    if form is None or not form.forbid_unknown_fields or not isinstance(data, Mapping):
        return []
    known = {field.name for field in msgspec.structs.fields(to)}
    return sorted(str(name) for name in data if name not in known and name != form.tag_field)


def _meant(unknown: Sequence[str], to: type, meanings: Mapping[str, str]) -> str:
    """What each of the fields could mean, and the next step."""
    known = [field.name for field in msgspec.structs.fields(to)]
    said = []
    for name in unknown[:LISTED]:
        if name in meanings:
            said.append(f"{cut(name, NAMED)} {meanings[name]}.")
        elif similar := difflib.get_close_matches(name, known, n=1):
            said.append(f"Did you mean {similar[0]}{f' by {cut(name, NAMED)}' * (len(unknown) > 1)}?")
    return " ".join((*said, "An unknown field is refused, because ignoring it could mean another model."))
