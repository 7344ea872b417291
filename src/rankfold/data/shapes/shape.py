"""``Shape``: one way of writing examples into rows, by the names of its columns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from rankfold.data.reading.row import Row
from rankfold.data.shapes.example import Example
from rankfold.errors import nearest

Columns = Mapping[str, str]  # field -> the column that holds it
Names = Mapping[str, tuple[str, ...]]  # field -> names that its column goes by, the first come first
BETWEEN_WORDS = re.compile(r"[\s-]+")


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """The name of a column without what people write differently: ``User Query`` is ``user_query``."""
    return BETWEEN_WORDS.sub("_", unicodedata.normalize("NFKC", name).strip().casefold())


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
        """This shape with its columns found among ``names``, however they are written; None if one that it
        needs is not there."""
        there = plain_names(names)
        columns = {}
        for name, known in (*self.needs.items(), *self.may.items()):
            found = next((c for c in known if c in there), None)
            if found is not None:
                columns[name] = there.pop(found)
            elif name in self.needs:
                return None
        return replace(self, columns=columns)

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether the needed columns are not all null, and the values are such as the shape accepts."""
        filled = any(values[self.columns[name]] is not None for name in self.needs)
        return filled and self.accepts(values, self.columns)

    def missing(self, names: Iterable[str]) -> list[str]:
        """The needed fields for which none of ``names`` is a column."""
        there = plain_names(names).keys()
        return [name for name, known in self.needs.items() if not there & {*known}]


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each column by its plain name.  Where two have the same, the one that is written so is meant."""
    names = list(names)
    return {plain_name(name): name for name in names} | {
        name: name for name in names if plain_name(name) == name
    }


def with_paths(values: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """``values`` with what stands inside an object under the dotted name that the user gave for it, such as
    ``reward_model.ground_truth``.  Raises ValueError if a column that the user named is not in the row."""
    found = dict(values)
    for name in shape.needs:
        column = shape.columns[name]
        if column not in found:
            inner: Any = values
            for key in column.split("."):
                inner = inner.get(key) if isinstance(inner, Mapping) else None
            if inner is None:
                raise ValueError(
                    f"no column {column!r}{nearest(column, values)}; the row has {sorted(values)}"
                )
            found[column] = inner
    return found
