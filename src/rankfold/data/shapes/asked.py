"""What a row asks, whether it holds an answer or not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rankfold.data.reading.row import Row
from rankfold.data.shapes.beside import beside, without
from rankfold.data.shapes.example import Message
from rankfold.data.shapes.formats import detect_shape, named_shape, to_example
from rankfold.data.shapes.shape import Shape
from rankfold.models.answering.asked import Question

# A column that stands in for the answer that a row to be asked need not have, for every shape's names.
ANSWER = "output"
STAND_IN = "?"
ROLES = ("user", "tool")  # whose turn an answer may follow


def question_of(
    row: Row, shape: str | None = None, leave_out: Collection[str] = (), system: str | None = None
) -> Question:
    """What ``row`` asks: its turns up to the last answer, which need not be there, or its only text.

    ``shape``: a name or columns, as for training; ``prompt=COLUMN`` is enough.  ``leave_out`` names columns
    and kinds of parts that are passed over.  ``system`` stands before a conversation that has no such turn.
    Raises ValueError in words that follow on the row's origin."""
    values = without(row.values, leave_out) if leave_out else dict(row.values)
    if shape is not None and "=" in shape and "," not in shape and shape.startswith("prompt="):
        shape, values = f"{shape},completion={ANSWER}", {**values, ANSWER: STAND_IN}
    row, found = _shaped(row, values, shape)
    example = to_example(row, found)
    if not example.messages:
        messages = [Message("user", (example.text,))]
    else:
        messages = [*example.messages]
        if messages[-1].role == "assistant":
            messages.pop()
    _refuse_unread(row, found)
    if not messages or messages[-1].role not in ROLES:
        raise ValueError("it asks nothing: its last turn before an answer is not the user's")
    if not messages[-1].text.strip() and not messages[-1].images:
        raise ValueError("the question is empty")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", (system,)))
    return Question([message.for_template() for message in messages], example.tools)


def _shaped(row: Row, values: Mapping[str, Any], given: str | None) -> tuple[Row, Shape]:
    """The row, with an answer that stands in for the one that it lacks, and its shape."""
    if given is not None:
        return replace(row, values=dict(values)), named_shape(given)
    with suppress(ValueError):
        found = detect_shape(values)
        if found.name != "text" or found.columns["text"] in ("text", "content"):
            return replace(row, values=dict(values)), found
    with_answer = {**values, ANSWER: STAND_IN}
    with suppress(ValueError):
        return replace(row, values=with_answer), detect_shape(with_answer)
    with suppress(ValueError):
        return replace(row, values=dict(values)), detect_shape(values)
    raise ValueError(
        f"no column of {sorted(values)} is known to hold a question; name it: --shape prompt=COLUMN"
    )


def _refuse_unread(row: Row, shape: Shape) -> None:
    """Raise ValueError for media or tools in the row that its shape has no place for."""
    problems, _ = beside(row, shape.columns, given=True)
    meant = [p.text for p in problems if p.fatal and (" holds media " in p.text or " holds tools " in p.text)]
    if meant:
        raise ValueError("; ".join(meant))
