"""``--fix``: a second pass over the rows that writes those that are left, mended where they can be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from rankfold.data.check.examination import Examination, mark_of
from rankfold.data.check.hints import mask_personal, printable
from rankfold.data.check.repair import as_row, repaired
from rankfold.data.reading.row import BadRow, Row
from rankfold.data.shapes.formats import named_shape
from rankfold.data.shapes.interpret import interpret
from rankfold.data.shapes.shape import Shape
from rankfold.data.shapes.sources import Source
from rankfold.errors import DataError
from rankfold.files import whole_file

AGAIN = "check them again"
LISTED = 20  # changes shown; the file of changes holds all
# What reading a row does to it, and writing it keeps.
MENDED = {
    "not-text": "number, truth value or date written as text",
    "nan": "NaN written as null",
    "encoding": "written in UTF-8",
}
CHANGES_SUFFIX = ".changes.tsv"


@dataclass
class FixedFile:
    """What was written: the file, its rows, how many rows were mended and left out, and the first changes
    as (origin, what was done).  All changes stand in ``changes_file``."""

    path: str
    changes_file: str
    rows: int = 0
    mended: int = 0
    left_out: int = 0
    done: dict[str, int] = field(default_factory=dict)
    first: list[tuple[str, str]] = field(default_factory=list)


def write_fixed(sources: list[Source], out: Path, examination: Examination) -> FixedFile:
    """Write the rows of ``sources`` to ``out``, one JSON object a line, in their order, whole or not at all.

    Left out: rows that cannot be read or mended, copies of earlier rows, and rows that are in the held-out
    rows.  Rows over the length stay as they are.  Raises DataError if the source has changed since the
    examination or nothing is left, OutputError if a file cannot be written."""
    changes_path = out.with_name(out.name + CHANGES_SUFFIX)
    fixed = FixedFile(path=str(out), changes_file=str(changes_path))
    ledger = examination.ledger
    row = 0
    with whole_file(changes_path) as changes, whole_file(out) as file:
        fixer = _Fixer(fixed, changes, examination)
        for row, (item, shape, source) in enumerate(_items_of(sources), start=1):
            if row > len(ledger) or ledger.origin(row - 1) != item.origin:
                raise DataError(f"the data changed while they were checked ({item.origin}); {AGAIN}")
            line = fixer.line(item, shape, source)
            if line is not None:
                file.write(line)
            fixed.rows += line is not None
            fixed.left_out += line is None
        if row != len(ledger):
            raise DataError(f"the data changed while they were checked; {AGAIN}")
        if not fixed.rows:
            raise DataError(f"no row can be used or mended; {out} was not written")
    return fixed


def _items_of(sources: list[Source]) -> Iterator[tuple[Row | BadRow, Shape | None, Source]]:
    for source in sources:
        shape = named_shape(source.shape) if source.shape else None
        for item in source.rows():
            yield item, shape, source


class _Fixer:
    """Mends row after row, and writes down what it did."""

    def __init__(self, fixed: FixedFile, changes: BinaryIO, examination: Examination) -> None:
        self._fixed = fixed
        self._changes = changes
        self._seen = examination.held_out_marks()

    def line(self, item: Row | BadRow, shape: Shape | None, source: Source) -> bytes | None:
        """The row as a line to write, or None if it is left out."""
        if isinstance(item, BadRow):
            self._leave_out(item.origin, "cannot be read", item.problem)
            return None
        values, done = repaired(item.values)
        found = interpret(replace(item, values=values), shape, source.leave_out)
        example, fatal = found.example, [problem for problem in found.problems if problem.fatal]
        done = [*done, *(MENDED[problem.rule] for problem in found.problems if problem.rule in MENDED)]
        if example is None or fatal:
            self._leave_out(item.origin, fatal[0].rule, fatal[0].text)
            return None
        mark = mark_of(example)
        if mark in self._seen:
            self._leave_out(item.origin, "copy", "a copy of an earlier or a held-out row")
            return None
        self._seen.add(mark)
        self._fixed.mended += bool(done)
        for what in done:
            self._note(item.origin, what, what.partition(":")[0])
        return (json.dumps(as_row(example), ensure_ascii=False) + "\n").encode()

    def _leave_out(self, origin: str, rule: str, why: str) -> None:
        self._note(origin, f"left out: {why}", f"left out: {rule}")

    def _note(self, origin: str, what: str, kind: str) -> None:
        done = self._fixed.done
        done[kind] = done.get(kind, 0) + 1
        line = printable(mask_personal(what))
        self._changes.write(f"{printable(origin)}\t{line}\n".encode())
        if len(self._fixed.first) < LISTED:
            self._fixed.first.append((origin, line))
