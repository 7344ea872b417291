"""What a row brings beside what its shape reads as it is written: told, or a reason to stop."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from rankfold.data.reading.row import Row
from rankfold.data.shapes.chat_shapes import EXCHANGE_KEYS, answers_of
from rankfold.data.shapes.fields import is_nothing, spelt
from rankfold.data.shapes.rules import Problem
from rankfold.data.shapes.shape import Columns, plain_name
from rankfold.data.shapes.turns import CONTENT_KEYS, JSON_TURNS, TURN_KEYS

NOT_TEXT = {"label", "images", "tools", "width", "height"}  # fields of shapes that hold no words
READ_KEYS = TURN_KEYS | EXCHANGE_KEYS
# What a column is called that changes what a row means, and what it holds.
LABELS = "labels"
MEANS = (
    (r"(video|audio|image|img|picture|photo|speech|voice|sound|media)s?(_(path|file|url|list))?s?", "media"),
    (r"(tool|function)(_call)?s?", "tools"),
    (r"((loss|sample|example|row|token)_)?weights?|loss_mask", "weights"),
    (r"labels?|kto_tag|desirable|(chosen|rejected)(_\w+)?", LABELS),
)
MEANING = tuple((re.compile(pattern), what) for pattern, what in MEANS)


def beside(row: Row, columns: Columns, given: bool = False) -> tuple[list[Problem], Collection[str]]:
    """What is to be told of ``row``, read by ``columns``; and the columns and keys of turns not read.

    Fatal is what would change its meaning, such as media, unless it is empty; labels are not where the user
    has ``given`` the shape."""
    used = {name if name in row.values else name.partition(".")[0] for name in columns.values()}
    unused = {name: row.values[name] for name in row.values.keys() - used if name or row.values[name]}
    notes = (note for note in row.notes if note.column in used or not note.column)
    found = [Problem(note.rule, note.text, False) for note in notes]
    for field, column in columns.items():
        value = row.values.get(column)
        if not isinstance(value, str) and (field not in NOT_TEXT or columns.keys() == {"text", "label"}):
            found += [Problem("not-text", text, False) for text in _not_text(value, column)]
            unused |= _not_read(value, column)
    for name, what in _meaningful(unused) if unused else ():
        if what != LABELS or not given:
            found.append(Problem("not-used", _told(name, what), True))
    return found, unused.keys()


def without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """``values`` without the columns, the keys of turns and the kinds of parts in ``names``."""
    plain = {plain_name(name) for name in names}
    return {key: _without(value, plain) for key, value in values.items() if plain_name(key) not in plain}


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, str) and JSON_TURNS.match(value):
        with suppress(ValueError):  # told where it is read
            turns = json.loads(value)
            value = turns if all(turn.keys() & {"role", "from"} for turn in _turns(turns)) else value
    if isinstance(value, list):
        kept = (item for item in value if not (isinstance(item, dict) and item.get("type") in names))
        return [_without(item, names) for item in kept]
    if isinstance(value, dict) and (value.keys() & {"role", "from"}):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return value


def _turns(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (turn for turn in value if isinstance(turn, dict))


def _not_text(value: Any, column: str) -> Iterator[str]:
    """What is read as text and is none, in words; the first of a conversation stands for all."""
    for place, item in enumerate(answers_of(value)):
        if isinstance(item, dict):
            texts = {f"{column}[{place}].{key}": item.get(key) for key in CONTENT_KEYS}
        else:
            texts = {column: item}
        for name, text in texts.items():
            if text is not None and is_nothing(text):
                yield f"{name!r} is NaN; read as null"
            elif not isinstance(text, str) and (shown := spelt(text)) is not None:
                yield f"{name!r} is the {_kind(text)} {shown}; read as text"
                return


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    return "number" if isinstance(value, int | float) else type(value).__name__.lower()


def _not_read(value: Any, column: str) -> dict[str, Any]:
    """The keys of turns that mean nothing here, with the first value of each that is none."""
    found: dict[str, Any] = {}
    for turn in _turns(value):
        for key in turn.keys() - READ_KEYS:
            found.setdefault(f"{column}[].{key}", turn[key])
    return found


def _meaningful(unused: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in unused.items():
        if is_nothing(value) or value in ("", [], {}):
            continue
        if (what := _meaning(name)) is not None:
            yield name, what


@lru_cache(maxsize=1024)
def _meaning(name: str) -> str | None:
    """What a column, or a key of turns, of this name holds that changes the meaning of a row."""
    plain = plain_name(name.rpartition(".")[2])
    return next((what for pattern, what in MEANING if pattern.fullmatch(plain)), None)


def _told(name: str, what: str) -> str:
    leaf = name.rpartition("].")[2]
    return f"{name!r} holds {what} that would not be used; --leave-out {leaf} goes on without"
