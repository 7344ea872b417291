"""Which shape a row has, and the example that it is then."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rankfold.data.reading.row import Row
from rankfold.data.shapes.chat_shapes import ANSWERS, TEXT, TURNS
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.pair_shapes import CHOSEN, PAIRS
from rankfold.data.shapes.shape import Shape, plain_names, with_paths
from rankfold.errors import DataError, bullet_list, nearest

# In the order in which they are tried: what needs more columns comes first.
SHAPES: Mapping[str, Shape] = {**PAIRS, **TURNS, **ANSWERS, **TEXT, **CHOSEN}
# Rows of known programs that hold no answer to learn, by a column that no others have.
OTHERS = {
    "reward_model": "a row for reinforcement learning (verl): its answer is only a ground truth that a "
    "reward compares with. To learn it as the answer, give the shape "
    "prompt=prompt,completion=reward_model.ground_truth",
}
DETECTED = tuple(shape for name, shape in SHAPES.items() if name not in CHOSEN)


def detect_shape(values: Mapping[str, Any]) -> Shape:
    """The shape of a row with these values, its columns found.  Raises ValueError saying what is missing."""
    if values.keys() == {"role", "content"}:
        raise ValueError("one turn, not a conversation; the turns of each conversation belong in one list")
    candidates = _candidates(tuple(values))
    for shape in candidates:
        if shape.fits(values):
            return shape
    if candidates:
        return candidates[0]  # its columns are null: its conversion says so
    raise ValueError(_nothing_fits(values))


@lru_cache(maxsize=1024)
def _candidates(names: tuple[str, ...]) -> tuple[Shape, ...]:
    """The shapes whose columns are all there; a single column of any other name is running text."""
    found = tuple(there for shape in DETECTED if (there := shape.bound(names)) is not None)
    named = [name for name in names if name]  # tables may have a column of row numbers without a name
    if not found and len(named) == 1 and _half_there(named) is None:
        return (replace(SHAPES["text"], columns={"text": named[0]}),)
    return found


def _half_there(names: Collection[str]) -> tuple[str, str] | None:
    """A field that is missing and the column that it is missing beside, in the first shape like that."""
    there = plain_names(names)
    for shape in DETECTED:
        lacking = shape.missing(names)
        if 0 < len(lacking) < len(shape.needs):
            return lacking[0], next(there[c] for known in shape.needs.values() for c in known if c in there)
    return None


def _nothing_fits(values: Mapping[str, Any]) -> str:
    for name, told in OTHERS.items():
        if name in values:
            return told
    half = _half_there(values)
    if half is not None:
        return (
            f"{half[0]!r} is missing beside {half[1]!r}; the row has {sorted(values)}. "
            "If it has another name, give the shape, such as prompt=COLUMN,completion=COLUMN"
        )
    return (
        f"no shape fits the columns {sorted(values)}; known are {', '.join(SHAPES)}. "
        "Name the columns, such as prompt=COLUMN,completion=COLUMN or text=COLUMN"
    )


def named_shape(text: str) -> Shape:
    """The shape that the user named: ``alpaca``, or columns by field, ``prompt=question,completion=answer``.

    Raises DataError listing the names that exist."""
    if "=" not in text:
        if text not in SHAPES:
            raise DataError(f"no shape {text!r}{nearest(text, SHAPES)}; known are {', '.join(SHAPES)}")
        return SHAPES[text]
    columns = {}
    for pair in text.split(","):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not (name and equals and column) or name in columns:
            raise DataError(
                f"the shape {text!r} must name each field once, as in prompt=COLUMN,completion=COLUMN"
            )
        columns[name] = column
    for shape in SHAPES.values():
        if shape.needs.keys() <= columns.keys() <= {*shape.needs, *shape.may}:
            return replace(shape, columns=columns)
    known = [f"{', '.join(shape.needs)} ({shape.name})" for shape in SHAPES.values()]
    raise DataError(bullet_list(f"no shape has just the fields {', '.join(columns)}; shapes need:", known))


def to_example(row: Row, shape: Shape) -> Example:
    """The row's example.  ``shape`` comes from ``detect_shape``, ``SHAPES`` or ``named_shape``.

    Raises ValueError, in words that follow on the row's origin, if its values are not such as the shape
    holds.  Whether the example can be trained on is for ``rules.problems`` to say."""
    found = bound(shape, row.values)
    if not row.values.keys() >= {*found.columns.values()}:
        row = replace(row, values=with_paths(row.values, shape))
    return found.convert(row, found.columns)


def bound(shape: Shape, values: Mapping[str, Any]) -> Shape:
    """``shape`` with its columns, found in the row unless the user named them; else ValueError."""
    if shape.columns:
        return shape
    found = shape.bound(values)
    if found is None:
        raise ValueError(f"no {' and no '.join(map(repr, shape.missing(values)))} for {shape.name}")
    return found
