"""Bytes of a data file, compressed or not, in bounded memory: chunks, and lines split at line feeds only."""

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
MAX_LINE_BYTES = 50_000_000
COMPRESSED = (".gz", ".zst")
# Text shrinks 3 to 30 times; what grows further than this, and past the free allowance, is a bomb.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 100_000_000
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


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


def text_chunks(path: Path) -> Iterator[bytes]:
    """``chunks`` without a byte-order mark.  Raises DataError if the file is in UTF-16."""
    first = True
    for chunk in chunks(path):
        if first and (chunk.startswith(UTF16_MARKS) or b"\x00" in chunk[:4]):
            raise DataError(f"{path}:1: not UTF-8 but UTF-16; save the file as UTF-8")
        yield chunk.removeprefix(b"\xef\xbb\xbf") if first else chunk
        first = False


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number from 1, without its line feed; None for one that is too long."""
    number, rest, overlong = 1, b"", False
    for chunk in text_chunks(path):
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            yield number, None if overlong or len(line) > MAX_LINE_BYTES else line
            number, overlong = number + 1, False
        if overlong or len(rest) > MAX_LINE_BYTES:
            rest, overlong = b"", True
    if rest or overlong:
        yield number, None if overlong else rest


def decoded(line: bytes) -> str:
    """The line as text.  Raises ValueError whose words follow on ``file:line``, with the column."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        raise ValueError(
            f":{column}: not UTF-8 (byte 0x{line[error.start]:02x}); "
            "if the file is in Latin-1 or Windows-1252, save it as UTF-8"
        ) from error


def too_long() -> str:
    return f": the line has more than {MAX_LINE_BYTES:,} bytes"
