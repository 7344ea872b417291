"""``Row`` and ``BadRow``: what every reader yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class WrittenNumber(float):
    """A number of a JSON file that remembers how it was written."""

    __slots__ = ("written",)

    def __new__(cls, written: str) -> WrittenNumber:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str


@dataclass(frozen=True, slots=True)
class Note:
    """What a reader took otherwise than it is written: the rule of the check that says so, and how.

    ``column`` is the one that it is about, empty if it is about the whole row."""

    rule: str
    text: str
    column: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands: ``file:line`` for text files, ``file:row`` (from 1) for others.

    ``folder`` is where relative paths in the record, such as those of images, start."""

    values: dict[str, Any]
    origin: str
    folder: str = ""
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record that cannot be used, where it stands, and why.  The rows after it can be."""

    origin: str
    problem: str
