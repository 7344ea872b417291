"""Writing rows in the formats in which they are read, one after another."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from rankfold.errors import OutputError

Rows = Callable[[], Iterable[Mapping[str, Any]]]  # which can be gone through again
BATCH_ROWS = 1024
CELL_CHARACTERS = 32_767  # of a cell of a workbook, at most


def suffix_of(path: Path) -> str:
    return path.suffix.lower()


def write_rows(path: Path, file: BinaryIO, rows: Rows, columns: Sequence[str]) -> list[str]:
    """Write ``rows`` to ``file`` in the format that ``path`` is named for; what had to be written otherwise
    than it is, in words.  ``columns`` are all that occur, in their order."""
    return WRITERS[suffix_of(path)](file, rows, columns)


def _json_lines(file: BinaryIO, rows: Rows, _: Sequence[str]) -> list[str]:
    for row in rows():
        file.write(f"{_json(row)}\n".encode())
    return []


def _json_list(file: BinaryIO, rows: Rows, _: Sequence[str]) -> list[str]:
    before = b"[\n"
    for row in rows():
        file.write(before + _json(row).encode())
        before = b",\n"
    file.write(b"\n]\n" if before != b"[\n" else b"[]\n")
    return []


def _commas(file: BinaryIO, rows: Rows, columns: Sequence[str], mark: str = ",") -> list[str]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, delimiter=mark)
    writer.writerow(columns)
    for row in rows():
        writer.writerow([_cell(row.get(column)) for column in columns])
    text.detach()
    return []


def _tabs(file: BinaryIO, rows: Rows, columns: Sequence[str]) -> list[str]:
    return _commas(file, rows, columns, "\t")


def _parquet(file: BinaryIO, rows: Rows, _: Sequence[str]) -> list[str]:
    """The columns' types are those that all of the rows allow, found in a first pass."""
    import pyarrow
    import pyarrow.parquet

    def tables() -> Iterator[Any]:
        for batch in _batches(rows()):
            names = dict.fromkeys(name for row in batch for name in row)
            yield pyarrow.table({name: [_plain(row.get(name)) for row in batch] for name in names})

    try:
        schema = pyarrow.unify_schemas([table.schema for table in tables()], promote_options="permissive")
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for batch in _batches(rows()):
                plain = [{name: _plain(value) for name, value in row.items()} for row in batch]
                writer.write_table(pyarrow.Table.from_pylist(plain, schema))
    except pyarrow.ArrowException as error:
        raise OutputError(
            f"the rows' columns hold values of kinds that no parquet column can hold together ({error}); "
            "name an --out that ends in .jsonl"
        ) from error
    return []


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    left = iter(rows)
    while batch := list(islice(left, BATCH_ROWS)):
        yield batch


def _workbook(file: BinaryIO, rows: Rows, columns: Sequence[str]) -> list[str]:
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("answers")
    sheet.append(list(columns))
    changed = 0
    for row in rows():
        cells = []
        for value in (_cell(row.get(column)) for column in columns):
            if isinstance(value, str):
                text = ILLEGAL_CHARACTERS_RE.sub("", value)[:CELL_CHARACTERS]
                changed += text != value
                cell = WriteOnlyCell(sheet, text)
                cell.data_type = "s"  # else a text that begins with = would be a formula
                cells.append(cell)
            else:
                cells.append(value)
        sheet.append(cells)
    book.save(file)
    return (
        [
            f"{changed:,} cells hold less than their text: a workbook takes no control characters, and "
            f"{CELL_CHARACTERS:,} characters a cell"
        ]
        if changed
        else []
    )


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, default=str)


def _cell(value: Any) -> Any:
    """A value as a cell holds it: lists and objects as JSON."""
    return _json(value) if isinstance(value, list | dict | tuple) else _plain(value)


def _plain(value: Any) -> Any:
    """Numbers that remember how they were written as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if type(value) is not float and isinstance(value, float) else value


WRITERS: dict[str, Callable[[BinaryIO, Rows, Sequence[str]], list[str]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _commas,
    ".tsv": _tabs,
    ".xlsx": _workbook,
    ".parquet": _parquet,
}
