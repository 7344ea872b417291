"""Reading rows from whatever holds them, in bounded memory, with the place of everything that is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rankfold.data.arrow_rows import arrow_rows, is_saved_dataset, parquet_rows, saved_dataset_rows
from rankfold.data.hub_rows import hub_rows
from rankfold.data.json_rows import json_rows
from rankfold.data.row import BadRow, Row
from rankfold.data.sheet_rows import sheet_rows
from rankfold.data.streams import COMPRESSED, data_suffix, require_regular_file
from rankfold.data.table_rows import table_rows
from rankfold.data.text_rows import text_rows
from rankfold.errors import DataError, bullet_list, nearest

__all__ = ["BadRow", "Row", "RowList", "read_rows", "stream_rows"]

Reader = Callable[[Path, str], Iterator[Row | BadRow]]
TEXT_READERS: dict[str, Reader] = {".txt": text_rows, ".md": text_rows}
READERS: dict[str, Reader] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": table_rows,
    ".tsv": table_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".xlsx": sheet_rows,
    **TEXT_READERS,
}
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


def stream_rows(source: str | Path, images: str | Path | None = None) -> Iterator[Row | BadRow]:
    """The records of ``source``, one after another, without holding more than a few of them; relative paths
    of images start in the folder ``images``, by default where the records are:

    * a file of JSON (lines, or an array), csv, tsv, parquet, arrow, xlsx, txt or md, also .gz or .zst
    * a folder of such files, in the order of their names; its text files only if there are no others
    * a folder that ``datasets`` saved; ``folder:split`` for one with several splits
    * ``organisation/name`` of a hub data set if there is no such path; ``:split`` or ``:config:split``

    Raises DataError at once if there is nothing to read there, and later if reading cannot go on."""
    rows = _rows(source)
    if images is None:
        return rows
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise DataError(f"no such folder of images: {images}, for the rows of {source}")
    return (replace(row, folder=str(folder)) if isinstance(row, Row) else row for row in rows)


def _rows(source: str | Path) -> Iterator[Row | BadRow]:
    name = str(source)
    path = Path(os.path.expanduser(name))
    if name.strip() and os.path.lexists(path):
        return _path_rows(path, name)
    before, _, split = os.path.expanduser(name).rpartition(":")
    if before and is_saved_dataset(Path(before)):
        return saved_dataset_rows(Path(before), split)
    return hub_rows(_hub_name(name))


def _path_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    if is_saved_dataset(path):
        return saved_dataset_rows(path, "")
    if path.is_dir():
        return _folder_rows(path)
    require_regular_file(path)
    return _reader(path)(path, name)


def _hub_name(name: str) -> str:
    if re.match(r"\w[\w+.-]*:/", name):
        raise DataError(f"{name} is a URL; nothing is fetched from one. Download the file, and name its path")
    first, *_ = name.split("/")
    is_file_name = Path(name.partition(":")[0]).suffix.lower() in (*READERS, *COMPRESSED)
    if is_file_name or not first or os.path.exists(first) or not HUB_NAME.fullmatch(name):
        near = Path(name).parent
        there = [str(near / entry) for entry in os.listdir(near)] if os.path.isdir(near) else []
        raise DataError(f"no such data file: {name}{nearest(name, there)}")
    return name


def _reader(path: Path) -> Reader:
    reader = READERS.get(data_suffix(path))
    if reader is None:
        known = " ".join(READERS)
        raise DataError(
            f"{path}: cannot tell the format from the name; known are {known}, and these .gz or .zst"
        )
    return reader


def _folder_rows(folder: Path) -> Iterator[Row | BadRow]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and data_suffix(path) in READERS
        and not NOT_ROWS.fullmatch(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    rows = [path for path in files if data_suffix(path) not in TEXT_READERS]
    if not files:
        raise DataError(f"the folder {folder} holds no data files; known are {' '.join(READERS)}")
    return (row for path in rows or files for row in _reader(path)(path, str(path)))
