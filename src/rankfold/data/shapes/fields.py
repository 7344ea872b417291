"""Reading one field of a row strictly: what shapes share.  Every ValueError speaks for itself."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from rankfold.data.reading.row import WrittenNumber

Values = Mapping[str, Any]


def text_of(values: Values, key: str) -> str | None:
    """The text at ``key``, or the number, truth value or date there as a file shows it (see ``spelt``);
    None for null or nothing.  Raises ValueError for anything else, for half of a surrogate pair, and for a
    NUL character."""
    value = values.get(key)
    text = value if isinstance(value, str) else spelt(value)
    if text is not None:
        check_text(text, key)
    elif not is_nothing(value):
        raise ValueError(f"{key!r} must be text, got {type(value).__name__}")
    return text


def spelt(value: Any) -> str | None:
    """A number, truth value or date as JSON spells it, a time at midnight as its date; None for what is none
    of these.  A number that was read from JSON stays as it was written: 0.10 is not 0.1."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, WrittenNumber):
        return value.written
    if isinstance(value, int | float | Decimal):
        return None if is_nothing(value) else str(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and not value.tzinfo:
        return value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, datetime.timedelta) else None


def is_nothing(value: Any) -> bool:
    """Whether ``value`` is null, or the NaN that stands for it in a table of numbers."""
    return value is None or (isinstance(value, float) and math.isnan(value))


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


def number_of(values: Values, key: str) -> float | None:
    """The number of at least 0 at ``key``, also as the text that a table holds; None if there is none."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


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
