"""Rows of xlsx workbooks, whose sheets' first rows name the columns."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankfold.data.reading.row import BadRow, Note, Row
from rankfold.data.reading.sheet_cells import shown
from rankfold.data.reading.streams import FREE_EXPANSION_BYTES, MAX_EXPANSION, expanded_file
from rankfold.data.reading.table_rows import checked_heading
from rankfold.errors import DataError


def sheet_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    """The rows of every sheet, placed as ``file:sheet:row``; empty rows are passed over.  A number, a
    truth value and a date are the text that the sheet shows, with a note, and a formula counts with its
    stored result.

    A cell beyond the heading and a cell with an error such as #N/A make a BadRow."""
    with expanded_file(path) as file:
        _refuse_bomb(file, name)
        try:
            import openpyxl

            book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
            for sheet in book.worksheets:
                sheet.reset_dimensions()  # the file may state them wrongly, and rows would be lost
                yield from _rows_of(sheet, f"{name}:{sheet.title}", str(path.parent))
            book.close()
        except DataError:
            raise
        except Exception as error:  # a damaged workbook fails in many ways inside openpyxl
            raise DataError(
                f"{name}: not a readable xlsx workbook ({type(error).__name__}: {error})"
            ) from error


def _refuse_bomb(path: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(part.file_size for part in archive.infolist())
    except zipfile.BadZipFile as error:
        raise DataError(f"{name}: not a readable xlsx workbook ({error})") from error
    most = max(FREE_EXPANSION_BYTES, MAX_EXPANSION * path.stat().st_size)
    if expanded > most:
        raise DataError(f"{name} would grow to {expanded:,} bytes; refused as a decompression bomb")


def _rows_of(sheet: Any, name: str, folder: str) -> Iterator[Row | BadRow]:
    heading: list[str] = []
    for number, cells in enumerate(sheet.iter_rows(), start=1):
        values = [cell.value for cell in cells]
        while values and values[-1] is None:
            values.pop()
        place = f"{name}:{number}"
        if not values:
            continue
        if not heading:
            heading = checked_heading(["" if value is None else str(value) for value in values], place)
            continue
        errors = [f"{cell.coordinate} is {cell.value}" for cell in cells if cell.data_type == "e"]
        if errors:
            yield BadRow(place, f"a formula failed: {', '.join(errors)}")
        elif len(values) > len(heading):
            yield BadRow(place, f"{len(values)} cells, but the heading has {len(heading)}: {heading}")
        else:
            texts = [
                value if value is None or isinstance(value, str) else shown(value, cell.number_format)
                for value, cell in zip(values, cells, strict=False)
            ]
            notes = tuple(
                Note(
                    "not-text",
                    f"{column!r} is {_kind(value)}; read as {text!r}, as the sheet shows it",
                    column,
                )
                for column, value, text in zip(heading, values, texts, strict=False)
                if text is not value
            )
            padded = [*texts, *[None] * (len(heading) - len(texts))]
            yield Row(dict(zip(heading, padded, strict=True)), place, folder, notes)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a truth value"
    return "a number" if isinstance(value, int | float) else "a date or a time"
