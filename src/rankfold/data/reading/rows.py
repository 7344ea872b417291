"""Reading rows from whatever holds them, in bounded memory, with the place of everything that is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rankfold.data.reading.arrow_rows import arrow_rows, is_saved_dataset, parquet_rows, saved_dataset_rows
from rankfold.data.reading.hub_rows import hub_rows
from rankfold.data.reading.json_rows import json_rows
from rankfold.data.reading.row import BadRow, Note, Row
from rankfold.data.reading.sheet_rows import sheet_rows
from rankfold.data.reading.streams import COMPRESSED, data_suffix, require_regular_file
from rankfold.data.reading.table_rows import table_rows
from rankfold.data.reading.text_file import TextFile
from rankfold.data.reading.text_rows import text_rows
from rankfold.errors import DataError, bullet_list, nearest

__all__ = ["BadRow", "Row", "RowList", "read_rows", "stream_rows"]

Rows = Iterator[Row | BadRow]
PROSE = (".txt", ".md")
TEXT_READERS: dict[str, Callable[[TextFile, str], Rows]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": table_rows,
    ".tsv": table_rows,
    **dict.fromkeys(PROSE, text_rows),
}
READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".xlsx": sheet_rows,
}
KNOWN = (*TEXT_READERS, *READERS)
# What datasets leaves beside the rows: descriptions, and copies of rows.
NOT_ROWS = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


class RowList(list[Row]):
    """The rows of a source; ``bad`` are the records that were left out."""

    def __init__(self, rows: list[Row], bad: list[BadRow]) -> None:
        super().__init__(rows)
        self.bad = tuple(bad)


def read_rows(source: str | Path, skip_bad: float = 0.0) -> RowList:
    """All rows of ``source`` (see ``stream_rows``).  Up to the share ``skip_bad`` of its records may be
    bad; they are left out and stand in the result's ``bad``.

    Raises DataError listing every bad record if there are more, or if no row is left."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    for row in stream_rows(source):
        if isinstance(row, Row):
            rows.append(row)
        else:
            bad.append(row)
    check_bad_share(bad, len(rows) + len(bad), skip_bad, f"the rows in {source} cannot be read")
    if not rows:
        raise DataError(f"{source} holds no rows")
    return RowList(rows, bad)


def check_bad_share(bad: list[BadRow], total: int, allowed: float, what: str) -> None:
    """Raise DataError listing ``bad`` if it is more than the share ``allowed`` of ``total`` records."""
    if len(bad) > allowed * total:
        headline = f"{len(bad)} of {what}"
        if allowed:
            headline += f", more than {100 * allowed:g} % of {total:,}"
        problems = [f"{row.origin}: {row.problem}" for row in bad]
        raise DataError(bullet_list(f"{headline}:", problems))


def stream_rows(
    source: str | Path, images: str | Path | None = None, encoding: str | None = None
) -> Iterator[Row | BadRow]:
    """The records of ``source``, one after another, without holding more than a few of them; relative paths
    of images start in the folder ``images``, by default where the records are.  ``encoding`` is that of its
    text files, if neither a mark nor the bytes tell:

    * a file of JSON (lines, or an array), csv, tsv, parquet, arrow, xlsx, txt or md, also .gz or .zst
    * a folder of such files, in the order of their names; its text files only if there are no others
    * a folder that ``datasets`` saved; ``folder:split`` for one with several splits
    * ``organisation/name`` of a hub data set if there is no such path; ``:split`` or ``:config:split``

    Raises DataError at once if there is nothing to read there, and later if reading cannot go on."""
    rows = _rows(source, encoding)
    if images is None:
        return rows
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise DataError(f"no such folder of images: {images}, for the rows of {source}")
    return (replace(row, folder=str(folder)) if isinstance(row, Row) else row for row in rows)


def _rows(source: str | Path, encoding: str | None) -> Rows:
    name = str(source)
    path = Path(os.path.expanduser(name))
    if name.strip() and os.path.lexists(path):
        return _path_rows(path, name, encoding)
    before, _, split = os.path.expanduser(name).rpartition(":")
    if before and is_saved_dataset(Path(before)):
        return saved_dataset_rows(Path(before), split)
    return hub_rows(_hub_name(name))


def _path_rows(path: Path, name: str, encoding: str | None) -> Rows:
    if is_saved_dataset(path):
        return saved_dataset_rows(path, "")
    if path.is_dir():
        return _folder_rows(path, encoding)
    require_regular_file(path)
    return _file_rows(path, name, encoding)


def _hub_name(name: str) -> str:
    if re.match(r"\w[\w+.-]*:/", name):
        raise DataError(f"{name} is a URL; nothing is fetched from one. Download the file, and name its path")
    first, *_ = name.split("/")
    is_file_name = Path(name.partition(":")[0]).suffix.lower() in (*KNOWN, *COMPRESSED)
    if is_file_name or not first or os.path.exists(first) or not HUB_NAME.fullmatch(name):
        near = Path(name).parent
        there = [str(near / entry) for entry in os.listdir(near)] if os.path.isdir(near) else []
        raise DataError(f"no such data file: {name}{nearest(name, there)}")
    return name


def _file_rows(path: Path, name: str, encoding: str | None) -> Rows:
    suffix = data_suffix(path)
    if suffix in READERS:
        return READERS[suffix](path, name)
    if suffix not in TEXT_READERS:
        known = " ".join(KNOWN)
        raise DataError(
            f"{path}: cannot tell the format from the name; known are {known}, and these .gz or .zst"
        )
    file = TextFile(path, encoding)
    reader = table_rows if suffix == ".txt" and _is_unicode_text(file) else TEXT_READERS[suffix]
    return _with_encoding(file, reader(file, name))


def _is_unicode_text(file: TextFile) -> bool:
    """Whether this is what Excel saves as "Unicode text": a table in UTF-16 with tabs, called .txt."""
    heading = next((line for _, line in file.lines()), b"") or b""
    return "UTF-16" in file.told and b"\t" in heading


def _with_encoding(file: TextFile, rows: Rows) -> Rows:
    for row in rows:
        if file.told and isinstance(row, Row):
            row = replace(row, notes=(*row.notes, Note("encoding", file.told)))  # noqa: PLW2901 - the same row
        yield row


def _folder_rows(folder: Path, encoding: str | None) -> Rows:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and data_suffix(path) in KNOWN
        and not NOT_ROWS.fullmatch(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    rows = [path for path in files if data_suffix(path) not in PROSE]
    if not files:
        raise DataError(f"the folder {folder} holds no data files; known are {' '.join(KNOWN)}")
    return (row for path in rows or files for row in _file_rows(path, str(path), encoding))
