"""From rows of several shapes to one thing: an example of messages, or of running text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rankfold.data.example import Example, Message
from rankfold.data.rows import Row
from rankfold.errors import DataError, bullet_list
from rankfold.models.facts import PromptStyle

ROLES = ("system", "user", "assistant")


def to_examples(rows: list[Row]) -> tuple[list[Example], PromptStyle, str]:
    """The examples, the prompt style they share, and the shape found, in words.

    Shapes: ``messages`` (role and content), ``prompt`` with ``completion``, or a single text column of
    any name (``{"jokes": "..."}``).  Raises DataError listing every row that is none of these."""
    examples, problems, shapes = [], [], Counter[str]()
    for row in rows:
        try:
            shape, convert = _shape(row.values)
            examples.append(convert(row))
            shapes[shape] += 1
        except ValueError as error:
            problems.append(f"{row.origin}: {error}")
    if len({bool(example.messages) for example in examples}) > 1:
        problems.append(f"rows of running text stand beside rows of messages: {dict(shapes)}; split the file")
    if problems:
        raise DataError(bullet_list(f"{len(problems)} problems in the rows:", problems))
    described = ", ".join(f"{count} rows of {shape}" for shape, count in shapes.items())
    return examples, "chat" if examples[0].messages else "plain", described


def _shape(values: dict[str, Any]) -> tuple[str, Callable[[Row], Example]]:
    if "messages" in values:
        return "messages", _from_messages
    if {"prompt", "completion"} <= values.keys():
        return "prompt and completion", _from_prompt
    if "prompt" in values or "completion" in values:
        missing = "completion" if "prompt" in values else "prompt"
        raise ValueError(
            f"{missing!r} is missing beside {next(iter(values.keys() & {'prompt', 'completion'}))!r}"
        )
    column = "text" if "text" in values else next(iter(values)) if len(values) == 1 else None
    if column is None:
        raise ValueError(
            f"no text found in the keys {sorted(values)}; "
            "wanted: messages, prompt and completion, or one text column"
        )
    return f"the text column {column!r}", lambda row: Example(row.origin, text=_text(row.values, column))


def _from_prompt(row: Row) -> Example:
    user = Message("user", (_text(row.values, "prompt"),))
    assistant = Message("assistant", (_text(row.values, "completion"),))
    return Example(row.origin, messages=(user, assistant))


def _from_messages(row: Row) -> Example:
    messages = row.values["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of objects with role and content")
    turns: list[Message] = []
    for place, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {place}: role must be one of {ROLES}, got {role!r}")
        try:
            turns.append(Message(role, (_text(message, "content"),)))
        except ValueError as error:
            raise ValueError(f"message {place}: {error}") from error
    _check_order([turn.role for turn in turns])
    return Example(row.origin, messages=tuple(turns))


def _check_order(roles: list[str]) -> None:
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    alternating = ["user" if place % 2 == 0 else "assistant" for place in range(len(spoken))]
    if not spoken or len(spoken) % 2 or spoken != alternating:
        raise ValueError(
            "turns must alternate user, assistant and end with assistant "
            f"(a system turn may come first), got {roles}"
        )


def _text(values: dict[str, Any], key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{key!r} must be text, got {'nothing' if text is None else type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{key!r} is empty")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is not text")
    return text
