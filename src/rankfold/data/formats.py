"""From rows of any shape to one thing: examples of messages, or of running text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from rankfold.data.chat_shapes import ANSWERS, TEXT, TURNS
from rankfold.data.example import Example
from rankfold.data.pair_shapes import CHOSEN, PAIRS
from rankfold.data.row import BadRow, Row
from rankfold.data.rules import problems
from rankfold.data.shape import Shape, require_columns
from rankfold.errors import DataError, bullet_list, nearest
from rankfold.models.adapters.metadata import PromptStyle

# In the order in which they are tried: what needs more columns comes first.
SHAPES: Mapping[str, Shape] = {**PAIRS, **TURNS, **ANSWERS, **TEXT, **CHOSEN}
MOST_NAMES = 8  # of unused columns in a description
DETECTED = tuple(shape for name, shape in SHAPES.items() if name not in CHOSEN)


def detect_shape(values: Mapping[str, Any]) -> Shape:
    """The shape of a row with these values, its columns found.  Raises ValueError saying what is missing."""
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
    found = tuple(bound for shape in DETECTED if (bound := shape.bound(names)) is not None)
    named = [name for name in names if name]  # tables may have a column of row numbers without a name
    if not found and len(named) == 1 and _half_there(named) is None:
        return (replace(SHAPES["text"], columns={"text": named[0]}),)
    return found


def _half_there(names: Collection[str]) -> tuple[str, str] | None:
    """A field that is missing and the column that it is missing beside, in the first shape like that."""
    for shape in DETECTED:
        lacking = shape.missing(names)
        if 0 < len(lacking) < len(shape.needs):
            return lacking[0], next(c for known in shape.needs.values() for c in known if c in names)
    return None


def _nothing_fits(values: Mapping[str, Any]) -> str:
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
    return shape.convert(row, _bound(shape, row.values).columns)


def _bound(shape: Shape, values: Mapping[str, Any]) -> Shape:
    """``shape`` with its columns, found in the row or known to be there; else ValueError."""
    if shape.columns:
        require_columns(shape, values)
        return shape
    bound = shape.bound(values)
    if bound is None:
        raise ValueError(f"no {' and no '.join(map(repr, shape.missing(values)))} for {shape.name}")
    return bound


@dataclass(slots=True)
class Converted:
    """Examples that can be trained on, the rows that cannot, the shapes that were found, with counts, and the
    columns that no shape had a use for."""

    examples: list[Example] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)

    @property
    def description(self) -> str:
        found = [f"{count:,} rows of {shape}" for shape, count in self.shapes.items()]
        names = sorted(self.unused)
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return "; ".join([*found, *([f"not used: {', '.join(names[:MOST_NAMES])}{more}"] if names else [])])


def convert(rows: Iterable[Row], shape: str | None = None) -> Converted:
    """Convert every row and hold it against the rules.  A row that breaks a fatal one is bad."""
    given = named_shape(shape) if shape else None
    converted = Converted()
    for row in rows:
        try:
            found = _bound(given, row.values) if given else detect_shape(row.values)
            example = to_example(row, found)
        except ValueError as error:
            converted.bad.append(BadRow(row.origin, str(error)))
            continue
        fatal = [problem.text for problem in problems(example) if problem.fatal]
        if fatal:
            converted.bad.append(BadRow(row.origin, "; ".join(fatal)))
        else:
            converted.examples.append(example)
            converted.unused.update(row.values.keys() - found.columns.values())
            converted.shapes[f"{found.name} ({'as given' if given else found.reason})"] += 1
    return converted


def to_examples(rows: Iterable[Row], shape: str | None = None) -> tuple[list[Example], PromptStyle, str]:
    """The examples, the prompt style they share, and the shapes found with the reason, in words.

    ``shape`` overrides detection (see ``named_shape``).  Raises DataError listing every row that cannot be
    trained on, or if text stands beside messages."""
    converted = convert(rows, shape)
    if converted.bad:
        texts = [f"{row.origin}: {row.problem}" for row in converted.bad]
        raise DataError(bullet_list(f"{len(texts)} problems in the rows:", texts))
    return converted.examples, prompt_style(converted), converted.description


def prompt_style(converted: Converted) -> PromptStyle:
    """``plain`` for running text, ``chat`` for all else.  Raises DataError if both are there, or nothing."""
    styles = {example.kind == "text" for example in converted.examples}
    if len(styles) > 1:
        raise DataError(
            f"rows of running text stand beside rows of messages: {converted.description}; split the file"
        )
    if not styles:
        raise DataError("there are no rows to train on")
    return "plain" if styles.pop() else "chat"


def refuse_untrainable(examples: Iterable[Example], *, sees_images: bool = False) -> None:
    """Raise DataError for what a supervised run cannot use as it is: preference pairs, judged answers, and
    pictures unless the model ``sees_images``."""
    kinds: dict[str, str] = {}
    for example in examples:
        kinds.setdefault(example.kind, example.origin)
        if not sees_images and any(message.images for message in example.messages):
            kinds.setdefault("pictures", example.origin)
    for kind, way_out in WAYS_OUT.items():
        if kind in kinds:
            raise DataError(f"{kinds[kind]}: {way_out}")


WAYS_OUT = {
    "preference": "the rows are preference pairs, and this run is supervised; "
    "give the shape 'chosen' to train on the chosen answers as chats",
    "feedback": "the rows are judged answers (KTO), and this run is supervised; give the shape by its "
    "columns (prompt=COLUMN,completion=COLUMN) to train on all answers, good or bad",
    "pictures": "the row has pictures; name a model that sees them with --model",
}
