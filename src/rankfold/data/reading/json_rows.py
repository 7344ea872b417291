"""Rows of JSON: one object or conversation a line, or an array of them, or objects one after another."""

from __future__ import annotations

import codecs
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rankfold.data.reading.row import BadRow, Note, Row, WrittenNumber
from rankfold.data.reading.streams import CHUNK_BYTES
from rankfold.data.reading.text_file import MAX_LINE_BYTES, TextFile, decoded, too_long
from rankfold.errors import DataError

EXCERPT_CHARS = 60
BLANK = " \t\r\n"
TURN_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


def json_rows(file: TextFile, name: str) -> Iterator[Row | BadRow]:
    """The objects of a file, each with the line on which it starts (further ones on that line with the
    column too).  Content decides: lines of objects, or an array, or objects over several lines.  A list of
    turns in the place of an object is a conversation.

    A bad line is a BadRow; after a mistake in an array nothing can be trusted, so it is a DataError."""
    if not _is_one_a_line(file):
        yield from _sequence_rows(file, name)
        return
    folder = str(file.path.parent)
    strict = Strict()
    for number, line in file.lines():
        place = f"{name}:{number}"
        if line is None:
            yield BadRow(place, too_long().removeprefix(": "))
        elif line.strip():
            try:
                values = strict.row(decoded(line))
                yield Row(values, place, folder, strict.notes())
            except ValueError as error:
                yield bad_row(place, error)


def bad_row(place: str, error: ValueError) -> BadRow:
    """``error`` speaks as ``:column: problem`` or ``: problem``."""
    column, _, problem = str(error).partition(": ")
    return BadRow(place + column, problem)


def _is_one_a_line(file: TextFile) -> bool:
    """Whether every line is a value of its own: not if the first one opens an array, unless that is a
    conversation and another follows, nor if it opens an object that it does not close."""
    filled = (line for _, line in file.lines() if line is None or line.strip())
    first, second = next(filled, b""), next(filled, b"")
    if first is None:
        return True
    text = first.decode(errors="replace").strip()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return not text.startswith("[") and not (text.startswith("{") and error.pos >= len(text))
    except (ValueError, RecursionError):
        return not text.startswith("[")
    return (
        not isinstance(value, list) or is_conversation(value) or bool(second and second.strip()[:1] == b"[")
    )


def is_conversation(value: Any) -> bool:
    """Whether ``value`` is a list of turns, with nothing around it."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(turn.keys() >= pair for pair in TURN_KEYS) for turn in value)
    )


class Strict:
    """A decoder that says what Python's would take in silence: a key given twice (the last one would win),
    NaN, and numbers too large for a float."""

    def __init__(self) -> None:
        self.clear()
        self.json = json.JSONDecoder(
            object_pairs_hook=self._unique_keys, parse_float=self._finite, parse_constant=self._constant
        )

    def row(self, text: str) -> dict[str, Any]:
        """One line's object, or the conversation that stands in its place, as ``messages``.  NaN, which
        Python writes for what is missing, is null.

        Raises ValueError whose words follow on ``file:line``."""
        self.clear()
        try:
            value = self.json.decode(text)
        except json.JSONDecodeError as error:
            raise ValueError(f":{error.colno}: {error.msg}: {_excerpt(text, error.colno - 1)}") from error
        except RecursionError as error:
            raise ValueError(": nested too deeply") from error
        except ValueError as error:  # a number of too many digits
            raise ValueError(f": {error}: {_excerpt(text, 0)}") from error
        values, problem = self.judged(value)
        if problem:
            raise ValueError(f": {problem}: {_excerpt(text, 0)}")
        return values

    def clear(self) -> None:
        self.problems: list[str] = []
        self._constants: set[str] = set()

    def judged(self, value: Any) -> tuple[dict[str, Any], str]:
        """The values of a row, and what is wrong with it."""
        if is_conversation(value):
            value = {"messages": value}
        if not isinstance(value, dict):
            return {}, f"expected an object like {{...}}, got {type(value).__name__}"
        return value, self.problems[0] if self.problems else ""

    def notes(self) -> tuple[Note, ...]:
        """What was read otherwise than it is written, in the value decoded last."""
        if not self._constants:
            return ()
        how = "null" if self._constants == {"NaN"} else "null, and as infinite numbers"
        return (Note("nan", f"{', '.join(sorted(self._constants))} is not JSON; read as {how}"),)

    def _unique_keys(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            self.problems.append(f"key given twice: {', '.join(sorted(twice))}")
        return values

    def _finite(self, text: str) -> float:
        number = WrittenNumber(text)
        if math.isinf(number):
            self.problems.append(f"{text} is too large for a number")
        return number

    def _constant(self, name: str) -> float | None:
        self._constants.add(name)
        return None if name == "NaN" else WrittenNumber(name)


def _excerpt(text: str, column: int) -> str:
    start = max(0, column - EXCERPT_CHARS // 2)
    piece = text[start : start + EXCERPT_CHARS].strip()
    return f"{'...' if start else ''}{piece}{'...' if start + EXCERPT_CHARS < len(text) else ''}"


class _Text:
    """A window on the file's text that grows at its end and is cut at its start."""

    def __init__(self, file: TextFile, name: str) -> None:
        self.name = name
        self.text, self.at = "", 0
        self.line, self.column = 1, 1  # of text[at]
        self._chunks = file.chunks()
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


def _sequence_rows(file: TextFile, name: str) -> Iterator[Row | BadRow]:
    text, strict = _Text(file, name), Strict()
    in_array = text.skip(BLANK) == "["
    if in_array:
        text.advance(text.at + 1)
    last_line = 0
    while text.skip(BLANK) not in ("", "]"):
        place = f"{name}:{text.line}" + (f":{text.column}" if text.line == last_line else "")
        last_line = text.line
        yield _next_row(text, strict, place, str(file.path.parent))
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


def _next_row(text: _Text, strict: Strict, place: str, folder: str) -> Row | BadRow:
    """Parse the value that starts here, reading on until it is whole."""
    while True:
        strict.clear()
        try:
            value, end = strict.json.raw_decode(text.text, text.at)
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
    values, problem = strict.judged(value)
    if problem:
        return BadRow(place, f"{problem}: {_excerpt(written, 0)}")
    return Row(values, place, folder, strict.notes())
