"""General text and questions by domain, by which it is told what a model has forgotten."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from rankfold.data.reading.row import BadRow, Row
from rankfold.data.shapes.convert import convert, refuse_untrainable
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.sources import Source
from rankfold.errors import DataError, bullet_list

DOMAIN = "domain"  # the column that names a row's
NO_GENERAL = "none"


@dataclass(frozen=True)
class GeneralRow:
    """A text or a conversation, and the domain that it is of."""

    domain: str
    example: Example


def general_rows(named: str | None = None) -> list[GeneralRow]:
    """The rows of the file that is ``named``, by default those that come along; none for "none".

    A row's domain is what its column ``domain`` says, else the file's name.  Raises DataError."""
    if named == NO_GENERAL:
        return []
    if named is not None:
        return _rows_of(Path(named).expanduser())
    folder = importlib.resources.files("rankfold.judging") / "general"
    with importlib.resources.as_file(folder / "general.jsonl") as file:
        return _rows_of(file)


def _rows_of(file: Path) -> list[GeneralRow]:
    rows = list(Source(file).rows())
    converted = convert(row for row in rows if isinstance(row, Row))
    bad = [*(row for row in rows if isinstance(row, BadRow)), *converted.bad]
    if bad or not rows:
        problems = [f"{row.origin}: {row.problem}" for row in bad] or ["it holds no rows"]
        raise DataError(bullet_list(f"{file} cannot serve as general text:", problems))
    refuse_untrainable(converted.examples)
    named = {row.origin: row.values.get(DOMAIN) for row in rows if isinstance(row, Row)}
    return [GeneralRow(str(named[each.origin] or file.stem), each) for each in converted.examples]
