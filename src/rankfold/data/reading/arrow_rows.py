"""Rows of parquet and arrow files, and of folders that ``datasets`` saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankfold.data.reading.row import BadRow, Row
from rankfold.data.reading.streams import expanded_file, require_regular_file
from rankfold.errors import DataError, bullet_list

BATCH_ROWS = 256


def parquet_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    """One record a row, placed as ``file:row`` from 1.  A column of class numbers whose names
    ``datasets`` wrote into the file holds the names."""
    import pyarrow.parquet

    with expanded_file(path) as file, _our_errors(name):
        table = pyarrow.parquet.ParquetFile(file)
        yield from _rows_of(table.iter_batches(BATCH_ROWS), table.schema_arrow, name, str(path.parent))


def arrow_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    """The same for an arrow file, in the file or the stream format."""
    import pyarrow

    with expanded_file(path) as file, _our_errors(name), pyarrow.OSFile(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
        else:
            source.seek(0)
            reader = batches = pyarrow.ipc.open_stream(source)
        yield from _rows_of(batches, reader.schema, name, str(path.parent))


def is_saved_dataset(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in ("state.json", "dataset_dict.json"))


def saved_dataset_rows(folder: Path, split: str) -> Iterator[Row | BadRow]:
    """The rows of a folder written by ``Dataset.save_to_disk``, or of one split of a ``DatasetDict``: the
    split named, else ``train``, else the only one.  Raises DataError if there is no such split."""
    if (folder / "dataset_dict.json").is_file():
        folder = folder / choose_split(_described(folder / "dataset_dict.json", "splits"), split, str(folder))
    told = _described(folder / "state.json", "_data_files")
    files = [Path(str(file.get("filename") if isinstance(file, dict) else file)) for file in told]
    for file in files:
        if file.name != str(file):  # the description may come from elsewhere: it must not lead out of here
            raise DataError(f"{folder / 'state.json'} names a file outside its folder: {file}")
    for file in files:
        require_regular_file(folder / file)
    return (row for file in files for row in arrow_rows(folder / file, str(folder / file)))


def choose_split(splits: list[str], wanted: str, source: str) -> str:
    """The split to read.  Raises DataError listing them if it is not clear which."""
    if wanted in splits or (not wanted and "train" in splits):
        return wanted or "train"
    if not wanted and len(splits) == 1:
        return splits[0]
    lacking = f"has no split {wanted!r}" if wanted else "has several splits"
    raise DataError(
        bullet_list(f"{source} {lacking}; name one of:", [f"{source}:{split}" for split in splits])
    )


def _described(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what datasets writes ({type(error).__name__}: {error})") from error
    if not isinstance(found, list):
        raise DataError(f"{path}: {key} must be a list, got {type(found).__name__}")
    return found


def _rows_of(batches: Any, schema: Any, name: str, folder: str) -> Iterator[Row]:
    classes = _class_names(schema)
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets in a file are not to be trusted
        for values in batch.to_pylist():
            number += 1
            yield Row(as_written(values, classes), f"{name}:{number}", folder)


def as_written(values: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any]:
    """The record as it was before it was a table's: classes by name, and the objects inside it without the
    nulls that arrow puts where one object of a column has a key and another has not."""
    _name_classes(values, classes)
    return {column: _without_nulls(value) for column, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _name_classes(values: dict[str, Any], classes: dict[str, list[str]]) -> None:
    """Put the class's name in the place of its number."""
    for column, names in classes.items():
        value = values.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            values[column] = names[value]


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The class names that ``datasets`` leaves in a schema's metadata, by column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


@contextmanager
def _our_errors(name: str) -> Iterator[None]:
    """Turn what arrow raises on a damaged file into a DataError."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: damaged, or not what its name says ({error})") from error
