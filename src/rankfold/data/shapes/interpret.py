"""A row whole: what it is, every rule that it breaks, and what of it is not used."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from rankfold.data.reading.row import Row
from rankfold.data.shapes.beside import beside, without
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.formats import bound, detect_shape, to_example
from rankfold.data.shapes.rules import Problem, problems
from rankfold.data.shapes.shape import Shape

NO_SHAPE = "shape"  # the rule that a row breaks which no example can be made of


@dataclass(frozen=True, slots=True)
class Interpretation:
    """``example`` is None if none can be made of the row.  ``problems`` are those for which a run would stop
    (the fatal ones) or which it passes over; ``shape`` is that of the row, and why, in words; ``unused`` are
    the columns, and the keys of turns, that it has no use for."""

    example: Example | None
    problems: list[Problem]
    shape: str = ""
    unused: Collection[str] = ()


def interpret(row: Row, given: Shape | None = None, leave_out: Collection[str] = ()) -> Interpretation:
    """``row`` as the data doctor and a run see it, of the shape ``given`` or the one that it has, without the
    columns and kinds of parts that ``leave_out`` names."""
    if leave_out:
        row = replace(row, values=without(row.values, leave_out))
    try:
        shape = bound(given, row.values) if given else detect_shape(row.values)
        example = to_example(row, shape)
    except ValueError as error:
        return Interpretation(None, [Problem(NO_SHAPE, str(error), fatal=True)])
    found, unused = beside(row, shape.columns, given=given is not None)
    return Interpretation(
        example,
        [*problems(example), *found],
        f"{shape.name} ({'as given' if given else shape.reason})",
        unused,
    )
