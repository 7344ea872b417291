"""``Shape``: one way of writing examples into rows, by the names of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rankfold.data.example import Example
from rankfold.data.row import Row
from rankfold.errors import nearest

Columns = Mapping[str, str]  # field -> the column that holds it
Names = Mapping[str, tuple[str, ...]]  # field -> names that its column goes by, the first come first


@dataclass(frozen=True, slots=True)
class Shape:
    """``why`` says in a sentence what a row of this shape is.  ``needs`` and ``may`` are its fields and the
    names that their columns go by; ``accepts`` looks at a row's values where names do not settle it.

    ``columns`` is empty in the table of shapes, and filled when a row's columns have been found."""

    name: str
    why: str
    needs: Names
    convert: Callable[[Row, Columns], Example]
    may: Names = field(default_factory=dict)
    accepts: Callable[[Mapping[str, Any], Columns], bool] = lambda values, columns: True
    columns: Columns = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Which columns told it, in words."""
        found = [self.columns[name] for name in self.needs if name in self.columns]
        return f"{'column' if len(found) == 1 else 'columns'} {', '.join(found)}"

    def bound(self, names: Iterable[str]) -> Shape | None:
        """This shape with its columns found among ``names``; None if one that it needs is not there."""
        there, columns = dict.fromkeys(names), {}
        for name, known in (*self.needs.items(), *self.may.items()):
            column = next((c for c in known if c in there), None)
            if column is not None:
                columns[name] = column
                del there[column]
            elif name in self.needs:
                return None
        return replace(self, columns=columns)

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether the needed columns are not all null, and the values are such as the shape accepts."""
        filled = any(values[self.columns[name]] is not None for name in self.needs)
        return filled and self.accepts(values, self.columns)

    def missing(self, names: Iterable[str]) -> list[str]:
        """The needed fields for which none of ``names`` is a column."""
        there = set(names)
        return [name for name, known in self.needs.items() if not there & {*known}]


def require_columns(shape: Shape, values: Mapping[str, Any]) -> None:
    """Raise ValueError if a column that the user named is not in the row."""
    for name in shape.needs:
        column = shape.columns[name]
        if column not in values:
            raise ValueError(f"no column {column!r}{nearest(column, values)}; the row has {sorted(values)}")
