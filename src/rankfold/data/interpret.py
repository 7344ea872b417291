"""A row as the data doctor sees it: what it is, and every rule that it breaks."""

from __future__ import annotations

from rankfold.data.example import Example
from rankfold.data.formats import detect_shape, to_example
from rankfold.data.row import Row
from rankfold.data.rules import Problem, problems
from rankfold.data.shape import Shape

NO_SHAPE = "shape"  # the rule that a row breaks which no example can be made of


def interpret(row: Row, given: Shape | None = None) -> tuple[Example | None, list[Problem], str]:
    """The example, if one can be made of the row, what is wrong with it, and the shape that was found.

    The problems are those for which a run would stop (the fatal ones) or which it passes over."""
    try:
        shape = given or detect_shape(row.values)
        example = to_example(row, shape)
    except ValueError as error:
        return None, [Problem(NO_SHAPE, str(error), fatal=True)], ""
    return example, problems(example), f"{shape.name} ({'as given' if given else shape.reason})"
