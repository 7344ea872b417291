"""The text of a data file: its lines in UTF-8, whatever encoding it was written in."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from rankfold.data.reading.streams import chunks
from rankfold.errors import DataError, nearest

MAX_LINE_BYTES = 50_000_000
HIGH_BYTES = re.compile(rb"[\x80-\xff]+")
SAMPLE_BYTES = 1 << 16  # by which an encoding is told
# UTF-32's mark begins like UTF-16's, so it comes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What Windows writes where it does not write Unicode, in the order in which they win if nothing tells them
# apart.  Others are read when they are named.
NARROW = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256")
WIDE = ("gb18030", "big5", "cp932", "cp949")


class TextFile:
    """The file at ``path``.  ``encoding`` is what the user says it is in; else its mark tells, or, from the
    first letter on that is not ASCII, its bytes.

    ``told`` says which it is in words, once that is known; it is empty for UTF-8 and what was named.
    Raises DataError for an encoding that nobody knows."""

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self.path, self.told = path, ""
        self.encoding = known_encoding(encoding) if encoding else None

    def chunks(self) -> Iterator[bytes]:
        """The text in UTF-8, without a byte-order mark.

        Raises DataError if the file cannot be read, or is not in its encoding.  What is not UTF-8 although
        the file is stays as it is."""
        pieces = chunks(self.path)
        first = next(pieces, b"")
        rest = chain([first], pieces)
        if self.encoding is not None:
            yield from _unmarked(rest) if self.encoding == "utf-8" else self._from(self.encoding, rest)
        elif wide := _wide_encoding(first):
            self.told = f"read as {wide.upper()}, which its first bytes are"
            yield from self._from(wide, rest)
        else:
            yield from self._utf8(_unmarked(rest))

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Each line with its number from 1, without its line feed; None for one that is too long."""
        number, rest, overlong = 1, b"", False
        for chunk in self.chunks():
            *complete, rest = (rest + chunk).split(b"\n")
            for line in complete:
                yield number, None if overlong or len(line) > MAX_LINE_BYTES else line
                number, overlong = number + 1, False
            if overlong or len(rest) > MAX_LINE_BYTES:
                rest, overlong = b"", True
        if rest or overlong:
            yield number, None if overlong else rest

    def _utf8(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            if not piece.isascii():
                encoding = _legacy_encoding(piece)
                if encoding is None:
                    yield from chain([piece], pieces)
                else:
                    self.told = f"not UTF-8; read as {encoding}, which is likeliest. --encoding names another"
                    yield from self._from(encoding, chain([piece], pieces))
                return
            yield piece

    def _from(self, encoding: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(encoding)()
        line = 1
        for piece in chain(pieces, [b""]):
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding, "ignore").count("\n")
                raise DataError(
                    f"{self.path}:{line}: not {encoding} ({error.reason}); name the encoding with --encoding"
                ) from error
            line += text.count("\n")
            yield text.encode()


def known_encoding(name: str) -> str:
    """Python's name of the encoding ``name``.  Raises DataError if it has none, or it is none of text."""
    try:
        found = codecs.lookup(name)
    except LookupError as error:
        known = [*dict.fromkeys(mark for _, mark in MARKS), *NARROW, *WIDE]
        raise DataError(
            f"no encoding {name!r}{nearest(name, known)}; known are {', '.join(known)}"
        ) from error
    if not found._is_text_encoding:
        raise DataError(f"{name} is no encoding of text")
    return "utf-8" if found.name == "utf-8-sig" else found.name


def _unmarked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield next(pieces, b"").removeprefix(codecs.BOM_UTF8)
    yield from pieces


def _wide_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32, by their marks, or, for a text that begins with ASCII, by its zeros."""
    for mark, name in MARKS:
        if start.startswith(mark):
            return None if name == "utf-8" else name
    zeros = [byte == 0 for byte in start[:4]]
    little, big = [False, True, False, True], [True, False, True, False]
    return "utf-16-le" if zeros == little else "utf-16-be" if zeros == big else None


def _legacy_encoding(piece: bytes) -> str | None:
    """The encoding that ``piece`` is likeliest in; None if that is UTF-8, with a damaged byte perhaps."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(piece)
    lost = text.count("\ufffd") - piece.count("\ufffd".encode())
    kept = len(text) - lost - len(text.encode("ascii", "ignore"))
    if lost <= kept:
        return None
    import charset_normalizer

    start = next(place for place, byte in enumerate(piece) if byte > 0x7F)  # noqa: PLR2004 - ASCII's last
    sample = piece[piece.rfind(b"\n", 0, start) + 1 :][:SAMPLE_BYTES]
    likely = NARROW if _stand_alone(sample) else (*NARROW, *WIDE)
    best = charset_normalizer.from_bytes(sample, cp_isolation=list(likely)).best()
    return next((name for name in likely if best is not None and _reads(name, sample) == str(best)), None)


def _stand_alone(sample: bytes) -> bool:
    """Whether most bytes beyond ASCII have none beside them: letters with marks, and no Chinese."""
    runs = [len(run) for run in HIGH_BYTES.findall(sample)]
    return runs.count(1) * 2 > len(runs)


def _reads(encoding: str, sample: bytes) -> str | None:
    try:
        return sample.decode(encoding)
    except UnicodeDecodeError:
        return None


def decoded(line: bytes) -> str:
    """The line as text.  Raises ValueError whose words follow on ``file:line``, with the column."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        raise ValueError(
            f":{column}: not UTF-8 (byte 0x{line[error.start]:02x}); "
            "if the file is in another encoding, name it with --encoding"
        ) from error


def too_long() -> str:
    return f": the line has more than {MAX_LINE_BYTES:,} bytes"
