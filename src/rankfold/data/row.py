"""``Row`` and ``BadRow``: what every reader yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands: ``file:line`` for text files, ``file:row`` (from 1) for others.

    ``folder`` is where relative paths in the record, such as those of images, start."""

    values: dict[str, Any]
    origin: str
    folder: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record that cannot be used, where it stands, and why.  The rows after it can be."""

    origin: str
    problem: str
