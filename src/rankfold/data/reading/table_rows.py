"""Rows of csv and tsv files, whose first row names the columns."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator

from rankfold.data.reading.json_rows import bad_row
from rankfold.data.reading.row import BadRow, Row
from rankfold.data.reading.streams import data_suffix
from rankfold.data.reading.text_file import MAX_LINE_BYTES, TextFile, decoded, too_long
from rankfold.errors import DataError


def table_rows(file: TextFile, name: str) -> Iterator[Row | BadRow]:
    """One record a row; a field in quotes may hold line feeds, and the row's place is the line on which it
    starts.  Every value is text.  What is not .tsv is split at commas, or, if its heading has none, at the
    semicolons or tabs that it has.

    A row with another number of fields than the heading is a BadRow.  A quote that is never closed
    swallows the rest of the file, and is a DataError."""
    feed = _Feed(file)
    text = iter(feed)
    records = csv.reader(text, delimiter=_delimiter(file), strict=True)
    heading: list[str] = []
    folder = str(file.path.parent)
    while True:
        place = f"{name}:{records.line_num + 1}"
        fields, error = _next_record(records, feed, place)
        if error is not None:
            if not heading:
                raise DataError(f"{place}{error}")
            yield bad_row(place, error)
        elif fields is None:
            return
        elif not heading:
            heading = checked_heading(fields, place) if any(fields) else []
        elif len(fields) == len(heading):
            yield Row(dict(zip(heading, fields, strict=True)), place, folder)
        elif fields:
            yield BadRow(place, f"{len(fields)} fields, but the heading has {len(heading)}: {heading}")


class _Feed:
    """The file's lines as text for the csv module.  A line that is no text is kept back in ``problem``,
    because an exception would end the iteration."""

    def __init__(self, file: TextFile) -> None:
        self._file = file
        self.problem: ValueError | None = None

    def __iter__(self) -> Iterator[str]:
        for _, line in self._file.lines():
            try:
                if line is None:
                    raise ValueError(too_long())
                yield decoded(line) + "\n"
            except ValueError as error:
                self.problem = error
                yield "\n"


def _next_record(
    records: Iterator[list[str]], feed: _Feed, place: str
) -> tuple[list[str] | None, ValueError | None]:
    """The next record, None at the end; or what is wrong with it."""
    # The csv module's own limit is 128 KB a field, which documents exceed; it is one for the process.
    usual = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        fields = next(records, None)
    except csv.Error as error:
        if "unexpected end" in str(error) or "field limit" in str(error):
            raise DataError(f"{place}: a quote opens in this row and is never closed") from error
        return None, ValueError(f": {_in_our_words(str(error))}")
    finally:
        csv.field_size_limit(usual)
    problem, feed.problem = feed.problem, None
    return fields, problem


def _in_our_words(error: str) -> str:
    if "new-line character" in error:
        return "a carriage return without a line feed stands in the row"
    if "expected after" in error:
        return "text follows a closing quote; a quote inside a quoted field must be doubled"
    return error


def _delimiter(file: TextFile) -> str:
    if data_suffix(file.path) == ".tsv":
        return "\t"
    heading = next((line for _, line in file.lines() if line and line.strip()), b"")
    return next((mark for mark in ",;\t" if mark.encode() in heading), ",")


def checked_heading(fields: list[str], place: str) -> list[str]:
    heading = [field.strip() for field in fields]
    twice = [field for field, count in Counter(heading).items() if count > 1]
    if twice:
        raise DataError(f"{place}: the heading names a column twice: {twice}")
    return heading
