"""InternVL's meta file: a JSON object that names data sets, each with its images' folder and its rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.errors import DataError, bullet_list, nearest

MOST_BYTES = 4 << 20  # a meta file names files; what is larger holds rows
KNOWN = ("root", "annotation", "repeat_time", "length", "data_augment", "max_dynamic_patch")


@dataclass(frozen=True, slots=True)
class MetaEntry:
    """One data set: the file of its rows, the folder of their images, how often each row counts, and what
    the meta file asks for that is not done here."""

    rows: str
    images: str | None
    weight: float
    left_out: str


def meta_entries(path: Path) -> list[MetaEntry] | None:
    """The data sets that a meta file names; None if ``path`` is a file of another kind.

    Paths in it are relative to the working folder, as InternVL's are, or to the file's own.
    Raises DataError listing everything that is wrong."""
    told = _meta_object(path)
    if told is None:
        return None
    problems: list[str] = []
    entries = [_entry(path, name, values, problems) for name, values in told.items()]
    if problems:
        raise DataError(bullet_list(f"{path} looks like a meta file of InternVL, but:", problems))
    return entries


def _meta_object(path: Path) -> dict[str, dict[str, Any]] | None:
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    try:
        told = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return None  # whoever reads it as rows says where it is broken
    if not isinstance(told, dict) or not told or not all(isinstance(v, dict) for v in told.values()):
        return None
    return told if any("annotation" in values for values in told.values()) else None


def _entry(path: Path, name: str, values: Mapping[str, Any], problems: list[str]) -> MetaEntry:
    for key in values.keys() - {*KNOWN}:
        problems.append(f"{name}: unknown key {key!r}{nearest(key, KNOWN)}; known are {', '.join(KNOWN)}")
    rows, root, weight = values.get("annotation"), values.get("root"), values.get("repeat_time", 1)
    if not isinstance(rows, str) or not rows.strip():
        problems.append(f"{name}: annotation must be the path of a file of rows, got {rows!r}")
    if root is not None and not isinstance(root, str):
        problems.append(f"{name}: root must be the path of the images' folder, got {root!r}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        problems.append(f"{name}: repeat_time must be a number above 0, got {weight!r}")
    if problems:
        return MetaEntry("", None, 1.0, "")
    images = _found(path, root) if root else None
    return MetaEntry(_found(path, str(rows)), images, float(weight), _left_out(values))


def _left_out(values: Mapping[str, Any]) -> str:
    told = []
    if values.get("data_augment"):
        told.append("data_augment (images are read as they are)")
    if "max_dynamic_patch" in values:
        told.append(f"max_dynamic_patch {values['max_dynamic_patch']} (say image_tiles, for all rows)")
    return ", ".join(told)


def _found(path: Path, name: str) -> str:
    beside = path.parent / os.path.expanduser(name)
    return str(beside) if not os.path.exists(os.path.expanduser(name)) and beside.exists() else name
