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
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np

from rankfold.data.shapes.example import Example
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.errors import OutputError
from rankfold.files import cache_folder, staged_folder
from rankfold.models.base.tokenizer_marks import tokenizer_marks

Encoded = tuple[Sequence[EncodedRow], list[str]]  # rows, and the names of those that were left out

LEAST_ROWS = 1000  # fewer are encoded in less time than the cache is worth
CACHE_BYTES = 4_000_000_000
LAYOUT = 1  # of the files; another number makes older entries unknown
ARRAYS = ("input_ids", "trained", "ends")
FACTS, DIGEST = "facts.json", "sha256"


class CachedRows(Sequence[EncodedRow]):
    """Encoded rows read from an entry; a row is made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS)
        self._input_ids, self._trained, self._ends = arrays
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self._origins: list[str] = facts["origins"]
        self.left_out: list[str] = facts["left_out"]

    def __len__(self) -> int:
        return len(self._origins)

    @overload
    def __getitem__(self, place: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[EncodedRow]: ...
    def __getitem__(self, place: int | slice) -> EncodedRow | list[EncodedRow]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        at = range(len(self))[place]
        part = slice(int(self._ends[at]), int(self._ends[at + 1]))
        ids = self._input_ids[part]
        labels = np.where(self._trained[part], ids, IGNORE)
        return EncodedRow(self._origins[at], ids.tolist(), labels.tolist())


def encode_cached(
    encode: Callable[[], Encoded], examples: Sequence[Example], marks: Mapping[str, Any]
) -> Encoded:
    """``encode()``, or what it gave the last time for the same ``examples`` (their places included, as they
    are named in errors) and ``marks``: everything else on which the result depends.

    An entry that cannot be read, or is not what was written, is made anew; a place that cannot be
    written only costs the time of tokenising again.  Rows with images are not kept: what they are made
    into depends on files that may change."""
    if len(examples) < LEAST_ROWS or any(m.images for example in examples for m in example.messages):
        return encode()
    folder = cache_folder() / "tokens" / entry_key(examples, marks)
    if (found := _read(folder)) is not None:
        return found, found.left_out
    rows, left_out = encode()
    try:
        with staged_folder(folder) as staging:
            _write(staging, rows, left_out)
        _make_room(folder)
    except (OutputError, OSError):
        return rows, left_out  # no space, no right to write, or another process was faster
    written = _read(folder)
    return (rows if written is None else written), left_out


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
        digest.update(hashlib.sha256(repr(example).encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _write(folder: Path, rows: Sequence[EncodedRow], left_out: list[str]) -> None:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)

    def flat(values: Iterator[Any], dtype: Any) -> Any:
        return np.fromiter(values, dtype=dtype, count=int(ends[-1]))

    np.save(folder / "ends.npy", ends)
    np.save(folder / "input_ids.npy", flat((i for row in rows for i in row.input_ids), np.int32))
    np.save(folder / "trained.npy", flat((i != IGNORE for row in rows for i in row.labels), np.bool_))
    facts = {"origins": [row.origin for row in rows], "left_out": left_out}
    (folder / FACTS).write_text(json.dumps(facts, ensure_ascii=True), encoding="utf-8")
    (folder / DIGEST).write_text(_digest(folder), encoding="ascii")


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
    for name in (*(f"{name}.npy" for name in ARRAYS), FACTS):
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
