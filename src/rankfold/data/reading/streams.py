"""Bytes of a data file, compressed or not, in bounded memory."""

from __future__ import annotations

import gzip
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankfold.errors import DataError

CHUNK_BYTES = 1 << 20
COMPRESSED = (".gz", ".zst")
# Text shrinks 3 to 30 times; what grows further than this, and past the free allowance, is a bomb.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 100_000_000


def require_regular_file(path: Path) -> int:
    """The size of the file in bytes.  Raises DataError for a pipe, a device, or what cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is a pipe or a device, not a file; write its rows to a file first")
    return status.st_size


def data_suffix(path: Path) -> str:
    """The suffix that tells the format: ``.jsonl`` for ``a.JSONL`` and ``a.jsonl.gz``."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, expanded if its name ends in ``.gz`` or ``.zst``.

    Raises DataError if it cannot be read, is damaged, or grows past what honest data grow."""
    size = require_regular_file(path)
    most = max(FREE_EXPANSION_BYTES, MAX_EXPANSION * size)
    read = 0
    try:
        with _open(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                read += len(chunk)
                if path.suffix.lower() in COMPRESSED and read > most:
                    raise DataError(
                        f"{path} grows from {size:,} to more than {most:,} bytes when expanded; "
                        "refused as a decompression bomb. If it is none, expand it yourself"
                    )
                yield chunk
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path} past byte {read:,}: {error}") from error


def _open(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind == ".gz":
        return gzip.open(path, "rb")
    if kind == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb", buffering=0)


@contextmanager
def expanded_file(path: Path) -> Iterator[Path]:
    """``path`` itself, or the temporary file that holds what it expands to."""
    if path.suffix.lower() not in COMPRESSED:
        require_regular_file(path)
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=data_suffix(path)) as file:
        for chunk in chunks(path):
            file.write(chunk)
        file.flush()
        yield Path(file.name)
