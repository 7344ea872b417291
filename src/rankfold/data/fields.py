"""Reading one field of a row strictly: what shapes share.  Every ValueError speaks for itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

Values = Mapping[str, Any]


def text_of(values: Values, key: str) -> str | None:
    """The text at ``key``; None for null or nothing.  Raises ValueError for anything else, for half of a
    surrogate pair, and for a NUL character."""
    text = values.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{key!r} must be text, got {type(text).__name__}")
    check_text(text, key)
    return text


def check_text(text: str, key: str) -> None:
    if text.isascii():
        if "\0" in text:
            raise ValueError(f"{key!r} holds a NUL character")
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is not text") from error
    if "\0" in text:
        raise ValueError(f"{key!r} holds a NUL character")


def one_of(values: Values, keys: Iterable[str]) -> Any:
    """The value of the first of ``keys`` that is there and not null."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def truth_of(values: Values, key: str) -> bool:
    """True or false at ``key``, also as 1 and 0, or as the words that a table holds."""
    value = values.get(key)
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    truth = known.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if truth is None:
        raise ValueError(f"{key!r} must be true or false, got {value!r}")
    return truth


def objects_of(values: Values, key: str) -> list[dict[str, Any]]:
    """The list of objects at ``key``, also if a table holds it as JSON text; empty for null."""
    found = values.get(key)
    if isinstance(found, str) and found.lstrip()[:1] in ("", "["):
        found = parsed(found, key) if found.strip() else None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{key!r} must be a list of objects, got {described(found)}")
    return found


def parsed(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key!r} is not the JSON that belongs there ({error}): {text[:60]!r}") from error


def described(value: Any) -> str:
    if isinstance(value, list):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {', '.join(kinds)}" if kinds else "an empty list"
    return type(value).__name__
