"""Rows of JSON: one object a line, or an array of objects, or objects one after another."""

from __future__ import annotations

import codecs
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rankfold.data.row import BadRow, Row
from rankfold.data.streams import CHUNK_BYTES, MAX_LINE_BYTES, decoded, lines, text_chunks, too_long
from rankfold.errors import DataError

EXCERPT_CHARS = 60
BLANK = " \t\r\n"


def json_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    """The objects of a file, each with the line on which it starts (further ones on that line with the
    column too).  Content decides: lines of objects, or an array, or objects over several lines.

    A bad line is a BadRow; after a mistake in an array nothing can be trusted, so it is a DataError."""
    first = next((line for _, line in lines(path) if line is None or line.strip()), b"")
    if first is not None and _starts_a_longer_value(first):
        yield from _sequence_rows(path, name)
        return
    folder = str(path.parent)
    for number, line in lines(path):
        if line is None:
            yield BadRow(f"{name}:{number}", too_long().removeprefix(": "))
        elif line.strip():
            try:
                yield Row(parse_object(decoded(line)), f"{name}:{number}", folder)
            except ValueError as error:
                yield bad_row(f"{name}:{number}", error)


def bad_row(place: str, error: ValueError) -> BadRow:
    """``error`` speaks as ``:column: problem`` or ``: problem``."""
    column, _, problem = str(error).partition(": ")
    return BadRow(place + column, problem)


def _starts_a_longer_value(line: bytes) -> bool:
    """Whether the first line opens an array, or an object that it does not close."""
    text = line.decode(errors="replace").strip()
    if text.startswith("["):
        return True
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return text.startswith("{") and error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return False


def parse_object(text: str) -> dict[str, Any]:
    """One line's object, strictly: no key twice, no NaN or infinite number.

    Raises ValueError whose words follow on ``file:line``."""
    try:
        value = STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f":{error.colno}: {error.msg}: {_excerpt(text, error.colno - 1)}") from error
    except RecursionError as error:
        raise ValueError(": nested too deeply") from error
    except ValueError as error:
        raise ValueError(f": {error}: {_excerpt(text, 0)}") from error
    return _require_object(value, text)


def _require_object(value: Any, text: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f": expected an object like {{...}}, got {type(value).__name__}: {_excerpt(text, 0)}"
        )
    return value


def _strict_decoder(report: Callable[[str], None]) -> json.JSONDecoder:
    """A decoder that reports what Python's would take in silence: a key given twice (the last one would
    win), NaN, and numbers too large for a float."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            report(f"key given twice: {', '.join(sorted(twice))}")
        return values

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            report(f"{text} is too large for a number")
        return number

    return json.JSONDecoder(
        object_pairs_hook=unique_keys,
        parse_float=finite,
        parse_constant=lambda name: report(f"{name} is not JSON"),
    )


def _refuse(problem: str) -> None:
    raise ValueError(problem)


STRICT = _strict_decoder(_refuse)


def _excerpt(text: str, column: int) -> str:
    start = max(0, column - EXCERPT_CHARS // 2)
    piece = text[start : start + EXCERPT_CHARS].strip()
    return f"{'...' if start else ''}{piece}{'...' if start + EXCERPT_CHARS < len(text) else ''}"


class _Text:
    """A window on the file's text that grows at its end and is cut at its start."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.text, self.at = "", 0
        self.line, self.column = 1, 1  # of text[at]
        self._chunks = text_chunks(path)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.ended = False

    def grow(self) -> bool:
        """Read on, doubling what is not used yet.  False if nothing was left to read."""
        self.text, self.at = self.text[self.at :], 0
        before = len(self.text)
        wanted = before + max(before, CHUNK_BYTES // 2)
        while not self.ended and len(self.text) < wanted:
            chunk = next(self._chunks, b"")
            self.ended = not chunk
            try:
                self.text += self._decoder.decode(chunk, final=self.ended)
            except UnicodeDecodeError as error:
                line = self.line + (self.text + error.object[: error.start].decode()).count("\n")
                byte = error.object[error.start]
                raise DataError(f"{self.name}:{line}: not UTF-8 (byte 0x{byte:02x})") from error
        return len(self.text) > before

    def advance(self, to: int) -> None:
        feeds = self.text.count("\n", self.at, to)
        self.line += feeds
        start = self.text.rindex("\n", self.at, to) + 1 if feeds else self.at
        self.column = to - start + (1 if feeds else self.column)
        self.at = to

    def skip(self, characters: str) -> str:
        """Go on to the next character that is none of these, and return it; empty at the end."""
        while True:
            to = self.at
            while to < len(self.text) and self.text[to] in characters:
                to += 1
            self.advance(to)
            if to < len(self.text):
                return self.text[to]
            if self.ended:
                return ""
            self.grow()

    def fail(self, message: str) -> DataError:
        found = _excerpt(self.text[self.at : self.at + EXCERPT_CHARS], 0)
        return DataError(f"{self.name}:{self.line}:{self.column}: {message}: {found}")


def _sequence_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    text = _Text(path, name)
    in_array = text.skip(BLANK) == "["
    if in_array:
        text.advance(text.at + 1)
    last_line = 0
    while text.skip(BLANK) not in ("", "]"):
        place = f"{name}:{text.line}" + (f":{text.column}" if text.line == last_line else "")
        last_line = text.line
        yield _next_row(text, place, str(path.parent))
        if in_array:
            _pass_comma(text)
    if in_array and not text.skip(BLANK):
        raise text.fail("the array does not end with ']'; is the file cut off?")
    if in_array:
        text.advance(text.at + 1)
    if text.skip(BLANK):
        raise text.fail("expected nothing more")


def _pass_comma(text: _Text) -> None:
    char = text.skip(BLANK)
    if char == ",":
        text.advance(text.at + 1)
        if text.skip(BLANK) == "]":
            raise text.fail("expected an element after ','")
    elif char not in ("", "]"):
        raise text.fail("expected ',' or ']' after an element of the array")


def _next_row(text: _Text, place: str, folder: str) -> Row | BadRow:
    """Parse the value that starts here, reading on until it is whole."""
    problems: list[str] = []
    decoder = _strict_decoder(problems.append)
    while True:
        problems.clear()
        try:
            value, end = decoder.raw_decode(text.text, text.at)
            break
        except json.JSONDecodeError as error:
            ahead = error.pos - text.at
            if len(text.text) - text.at > MAX_LINE_BYTES or not text.grow():
                text.advance(min(text.at + ahead, len(text.text)))
                raise text.fail(error.msg) from error
        except RecursionError as error:
            raise text.fail("nested too deeply") from error
        except ValueError as error:
            raise text.fail(str(error)) from error
    written = text.text[text.at : min(end, text.at + 2 * EXCERPT_CHARS)]
    text.advance(end)
    if not isinstance(value, dict):
        problems.append(f"expected an object like {{...}}, got {type(value).__name__}")
    return BadRow(place, f"{problems[0]}: {_excerpt(written, 0)}") if problems else Row(value, place, folder)
