"""Encoded rows kept on disk, so that the same rows are tokenised once.

An entry is a folder of plain arrays under ``tokens`` in the cache folder, named by the hash of all that
decides its content.  It appears whole or not at all, is checked by hash when it is read, and is mapped into
memory, not copied.  The folder may be deleted at any time; entries not used for longest go first when all
of them exceed CACHE_BYTES."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfold.data.on_demand import OnDemand
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.example_store import packed
from rankfold.data.tokens.encode import IGNORE, EncodedRow, Encoding
from rankfold.errors import OutputError
from rankfold.files import cache_folder, staged_folder
from rankfold.models.base.tokenizer_marks import tokenizer_marks

Places = NDArray[np.int64]

LEAST_ROWS = 1000  # fewer are encoded in less time than the cache is worth
CACHE_BYTES = 4_000_000_000
LAYOUT = 3  # of the files; another number makes older entries unknown
ARRAYS = {
    "input_ids": np.int32,
    "trained": np.bool_,
    "weights": np.float32,  # empty if every token counts 1
    "ends": np.int64,
    "origins": np.uint8,
    "origin_ends": np.int64,
}
WRITTEN_ROWS = 2048  # at a time
FACTS, DIGEST = "facts.json", "sha256"


class CachedRows(OnDemand[EncodedRow]):
    """Encoded rows read from an entry, all or those at ``places``; a row is made when it is asked for."""

    def __init__(self, folder: Path, places: Places | None = None) -> None:
        self.folder = folder
        self._arrays = {name: _mapped(folder / name, kind) for name, kind in ARRAYS.items()}
        self._places = np.arange(len(self._arrays["ends"]) - 1) if places is None else places
        self.left_out: list[str] = json.loads((folder / FACTS).read_text(encoding="utf-8"))["left_out"]

    def __len__(self) -> int:
        return len(self._places)

    def _item(self, at: int) -> EncodedRow:
        at = int(self._places[at])
        ids, trained = self._part("input_ids", at), self._part("trained", at)
        labels = np.where(trained, ids, IGNORE)
        origin = self._part("origins", at, "origin_ends").tobytes().decode("utf-8", "surrogatepass")
        counts = self._part("weights", at)
        weights = None if np.all(counts == 1) else counts.tolist()
        return EncodedRow(origin, ids.tolist(), labels.tolist(), weights=weights)

    @property
    def lengths(self) -> Places:
        """Of each row, in tokens."""
        found: Places = np.diff(self._arrays["ends"])[self._places]
        return found

    def up_to(self, most: int) -> CachedRows:
        """The rows of at most ``most`` tokens."""
        return CachedRows(self.folder, self._places[self.lengths <= most])

    def trained(self) -> Iterator[NDArray[Any]]:
        """The trained tokens of all rows, some rows at a time."""
        for start in range(0, len(self), WRITTEN_ROWS):
            for at in self._places[start : start + WRITTEN_ROWS].tolist():
                found: NDArray[Any] = self._part("input_ids", at)[self._part("trained", at)]
                yield found

    def numbers(self) -> Iterator[bytes]:
        """Each row as its length, its tokens, its labels and its weights, if any, in 64 bits each."""
        for at in self._places.tolist():
            ids = self._part("input_ids", at).astype(np.int64)
            labels = np.where(self._part("trained", at), ids, IGNORE)
            counts = self._part("weights", at)
            weights = counts[: 0 if np.all(counts == 1) else None].astype("<f8").view("<i8")
            yield np.concatenate([[len(ids)], ids, labels, weights]).astype("<i8").tobytes()

    def _part(self, name: str, at: int, ends: str = "ends") -> Any:
        bounds = self._arrays[ends]
        return self._arrays[name][int(bounds[at]) : int(bounds[at + 1])]


def _mapped(path: Path, kind: Any) -> Any:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)


def lengths_of(rows: Sequence[EncodedRow]) -> array[int]:
    """The tokens of each row, without making the rows."""
    if isinstance(rows, CachedRows):
        return array("I", rows.lengths.astype(np.uint32).tobytes())
    return array("I", map(len, rows))


def trained_counts(rows: Sequence[EncodedRow], tokens: Collection[int]) -> tuple[int, dict[int, int]]:
    """How many tokens are trained, and how often each of ``tokens`` is."""
    found, total = dict.fromkeys(tokens, 0), 0
    for trained in rows.trained() if isinstance(rows, CachedRows) else map(_trained, rows):
        total += len(trained)
        for token in tokens:
            found[token] += int(np.count_nonzero(trained == token))
    return total, found


def _trained(row: EncodedRow) -> NDArray[Any]:
    labels = np.array(row.labels)
    found: NDArray[Any] = labels[labels != IGNORE]
    return found


def encode_cached(
    encoding: Encoding, examples: Sequence[Example], marks: Mapping[str, Any]
) -> tuple[Sequence[EncodedRow], list[str]]:
    """The rows of ``encoding``, and the names of those that were left out; or what these were the last time
    for the same ``examples`` (their places included, as they are named in errors) and ``marks``: everything
    else on which the result depends.

    An entry that cannot be read, or is not what was written, is made anew; a place that cannot be
    written only costs the time of tokenising again.  Rows with images are not kept: what they are made
    into depends on files that may change."""
    if len(examples) < LEAST_ROWS or encoding.reader is not None:
        return list(encoding), encoding.over
    folder = cache_folder() / "tokens" / entry_key(examples, marks)
    if (found := _read(folder)) is not None:
        return found, found.left_out
    try:
        with staged_folder(folder) as staging:
            _write(staging, encoding)
        _make_room(folder)
    except (OutputError, OSError):  # no space, no right to write, or another process was faster
        written = _read(folder)
        return (list(encoding), encoding.over) if written is None else (written, written.left_out)
    written = _read(folder)
    return (list(encoding), encoding.over) if written is None else (written, written.left_out)


def encoding_marks(tokenizer: Any, **options: Any) -> dict[str, Any]:
    """What decides how examples become tokens: the whole tokenizer, the options, and the code's version."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else repr(tokenizer)
    return {
        **tokenizer_marks(tokenizer),
        "tokenizer": hashlib.sha256(whole.encode()).hexdigest(),
        "special": str(tokenizer.special_tokens_map),
        "options": {name: repr(value) for name, value in options.items()},
        "versions": {name: version(name) for name in ("rankfold", "transformers", "tokenizers")},
    }


def entry_key(examples: Sequence[Example], marks: Mapping[str, Any]) -> str:
    """The name of the entry: a hash of every example and of ``marks``."""
    digest = hashlib.sha256(json.dumps([LAYOUT, marks], sort_keys=True).encode())
    for example in examples:
        digest.update(packed(example))
    return digest.hexdigest()


def _write(folder: Path, encoding: Encoding) -> None:
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in ARRAYS}
        ends = {"ends": 0, "origin_ends": 0}
        for name in ends:
            files[name].write(np.int64(0).tobytes())
        rows = iter(encoding)
        while chunk := list(islice(rows, WRITTEN_ROWS)):
            origins = [row.origin.encode("utf-8", "surrogatepass") for row in chunk]
            lists: dict[str, list[Any]] = {"ends": [row.input_ids for row in chunk], "origin_ends": origins}
            for name, items in lists.items():
                sums = ends[name] + np.cumsum([len(item) for item in items], dtype=np.int64)
                files[name].write(sums.tobytes())
                ends[name] = int(sums[-1])
            files["origins"].write(b"".join(origins))
            ids = [np.array(row.input_ids, np.int32) for row in chunk]
            files["input_ids"].write(np.concatenate(ids).tobytes())
            labels = np.concatenate([np.array(row.labels, np.int64) for row in chunk])
            files["trained"].write((labels != IGNORE).tobytes())
            if files["weights"].tell() or any(row.weights is not None for row in chunk):
                missing = ends["ends"] - len(labels) - files["weights"].tell() // np.float32().nbytes
                counts = [[1.0] * missing, *(row.weights or [1.0] * len(row) for row in chunk)]
                files["weights"].write(np.concatenate(counts).astype(np.float32).tobytes())
    (folder / FACTS).write_text(json.dumps({"left_out": encoding.over}, ensure_ascii=True), encoding="utf-8")
    (folder / DIGEST).write_text(_digest(folder), encoding="ascii")


def entry_named(name: str) -> CachedRows | None:
    """The entry of that name, if it is there as it was written."""
    return _read(cache_folder() / "tokens" / name)


def _read(folder: Path) -> CachedRows | None:
    """The entry, or None and no entry any more if it is not as it was written."""
    if not folder.is_dir():
        return None
    try:
        if (folder / DIGEST).read_text(encoding="ascii") == _digest(folder):
            os.utime(folder)  # used just now
            return CachedRows(folder)
    except (OSError, ValueError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (*ARRAYS, FACTS):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _make_room(newest: Path) -> None:
    """Delete the entries that were not used for longest until all of them fit in CACHE_BYTES."""
    entries = [entry for entry in newest.parent.iterdir() if not entry.name.startswith(".")]
    entries.sort(key=lambda entry: (entry == newest, entry.stat().st_mtime), reverse=True)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.iterdir())
        if total > CACHE_BYTES and entry != newest:
            shutil.rmtree(entry, ignore_errors=True)
