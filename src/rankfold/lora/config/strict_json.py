"""Reading a JSON object that someone else wrote: what ``json.loads`` lets pass in silence is an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rankfold.errors import AdapterError

MAX_DEPTH = 20  # PEFT's own files nest three deep
MAX_DIGITS = 18  # what fits into 64 bits


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in the file ``path``.

    Raises AdapterError if it is too large, not JSON, no object, nested too deep, names a key twice (the
    last one would win without a word), or holds NaN, Infinity, or a number beyond 64 bits."""
    size = path.stat().st_size
    if size > max_bytes:
        raise AdapterError(f"{path} has {size:,} bytes; no such file of an adapter is that large")
    try:
        content = json.loads(
            path.read_bytes(),
            object_pairs_hook=_unique,
            parse_constant=_refuse_number,
            parse_float=_finite,
            parse_int=_small,
        )
        if _depth(content) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds a {type(content).__name__}, not an object of named values")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _small(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"the number {text[:40]}... has {len(text):,} digits")
    return int(text)


def _depth(content: object) -> int:
    if not isinstance(content, (dict, list)):
        return 0
    inner = content.values() if isinstance(content, dict) else content
    return 1 + max(map(_depth, inner), default=0)
