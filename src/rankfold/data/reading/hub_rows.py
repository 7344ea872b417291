"""Rows of a data set on the Hugging Face hub, read by ``datasets`` as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rankfold.data.reading.arrow_rows import as_written, choose_split
from rankfold.data.reading.row import Row
from rankfold.errors import DataError


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of ``organisation/name``, ``organisation/name:split`` or ``organisation/name:config:split``,
    placed as ``name:split:row`` from 1.  Without a split: ``train``, else the only one.

    Code from the hub is never run.  Raises DataError if the hub does not give the data set."""
    path, *rest = name.split(":")
    config, split = [None, *rest][-2:] if rest else (None, "")
    with _our_errors(path):
        import datasets

        splits = datasets.get_dataset_split_names(path, config)
        chosen = choose_split(splits, split or "", path if config is None else f"{path}:{config}")
        data = datasets.load_dataset(path, config, split=chosen, streaming=True)
    if data.features:
        data = data.decode(False)  # images stay the paths that they are
    return _rows_of(data, path, f"{path}:{chosen}")


def _rows_of(data: Any, path: str, name: str) -> Iterator[Row]:
    features = (data.features or {}).items()
    classes = {column: feature.names for column, feature in features if hasattr(feature, "names")}
    records, number = iter(data), 0
    while True:
        with _our_errors(path):
            values = next(records, None)
        if values is None:
            return
        number += 1
        yield Row(as_written(values, classes), f"{name}:{number}")


@contextmanager
def _our_errors(path: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # network, hub and format errors share no base class
        raise DataError(
            f"cannot load the data set {path!r}: there is no such path here, and the hub did not give it "
            f"({type(error).__name__}: {error})"
        ) from error
