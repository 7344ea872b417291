"""Reading rows from a file, with the place of everything that is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.errors import DataError, bullet_list

EXCERPT_CHARS = 60
MAX_LINE_BYTES = 50_000_000


@dataclass(frozen=True)
class Row:
    """One record and where it stands, as ``file:line``."""

    values: dict[str, Any]
    origin: str


def read_rows(path: Path) -> list[Row]:
    """Read a ``.jsonl`` file: UTF-8, one JSON object a line; a byte-order mark, CRLF and blank lines
    are accepted.  Lines are split at line feeds only, so U+2028 inside a string does no harm.

    Raises DataError listing every bad line with line, column and excerpt."""
    content = _content(path)
    rows, problems = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(Row(_parse(line), f"{path}:{number}"))
            except ValueError as error:
                problems.append(f"{path}:{number}{error}")
    if problems:
        raise DataError(bullet_list(f"{len(problems)} of the lines in {path} cannot be read:", problems))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _content(path: Path) -> bytes:
    if not path.exists():
        raise DataError(f"no such data file: {path}")
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a .jsonl file with one JSON object a line")
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any]:
    """One line's object.  Raises ValueError whose text follows on ``file:line``."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f": the line has {len(line):,} bytes, more than {MAX_LINE_BYTES:,}")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f":{error.start + 1}: not UTF-8 (byte 0x{line[error.start]:02x})") from error
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicate_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f":{error.colno}: {error.msg}: {_excerpt(text, error.colno - 1)}") from error
    except RecursionError as error:
        raise ValueError(": nested too deeply") from error
    except ValueError as error:
        raise ValueError(f": {error}: {_excerpt(text, 0)}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f": expected an object like {{...}}, got {type(value).__name__}: {_excerpt(text, 0)}"
        )
    return value


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key given twice: {', '.join(twice)}")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _excerpt(text: str, column: int) -> str:
    start = max(0, column - EXCERPT_CHARS // 2)
    piece = text[start : start + EXCERPT_CHARS].strip()
    return f"{'...' if start else ''}{piece}{'...' if start + EXCERPT_CHARS < len(text) else ''}"
