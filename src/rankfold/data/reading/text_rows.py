"""Raw text for continued pre-training: a text file is one text, and a long one is cut between paragraphs."""

from __future__ import annotations

from collections.abc import Iterator

from rankfold.data.reading.json_rows import bad_row
from rankfold.data.reading.row import BadRow, Row
from rankfold.data.reading.text_file import TextFile, decoded, too_long

# About 500 tokens of English, 1,200 of Chinese: a passage fits the lengths that small machines train on.
PASSAGE_CHARS = 2_000


def text_rows(file: TextFile, name: str) -> Iterator[Row | BadRow]:
    """The file as ``{"text": ...}``, in passages of whole paragraphs (ended by a blank line) of up to
    PASSAGE_CHARS characters, each with the line on which it starts.  A longer paragraph is cut at its
    line ends, and a longer line at its spaces."""
    folder = str(file.path.parent)
    passage, start = "", 0
    for block in _blocks(file, name):
        if isinstance(block, BadRow):
            yield block
            continue
        line, text = block
        if passage and len(passage) + len(text.rstrip()) > PASSAGE_CHARS:
            if passage.strip():
                yield Row({"text": passage.rstrip()}, f"{name}:{start}", folder)
            passage = ""
        start = start if passage else line
        passage += text
    if passage.strip():
        yield Row({"text": passage.rstrip()}, f"{name}:{start}", folder)


def _blocks(file: TextFile, name: str) -> Iterator[tuple[int, str] | BadRow]:
    """Paragraphs with the blank lines behind them, each with its first line; in pieces where too long."""
    block, start = "", 0
    for number, line in file.lines():
        try:
            if line is None:
                raise ValueError(too_long())
            text = decoded(line).removesuffix("\r")
        except ValueError as error:
            yield bad_row(f"{name}:{number}", error)
            continue
        new_paragraph = block.endswith("\n\n") and text.strip()
        if block and (new_paragraph or len(block) + len(text) > PASSAGE_CHARS):
            yield start, block
            block = ""
        if block or text.strip():
            *full, rest = _cut(text)
            yield from ((number, piece) for piece in full)
            start = start if block else number
            block += (rest if text.strip() else "") + "\n"
    if block:
        yield start, block


def _cut(line: str) -> list[str]:
    """The line in pieces of up to PASSAGE_CHARS, cut behind spaces where there are any."""
    pieces, start = [], 0
    while len(line) - start > PASSAGE_CHARS:
        end = line.rfind(" ", start + 1, start + PASSAGE_CHARS) + 1 or start + PASSAGE_CHARS
        pieces.append(line[start:end])
        start = end
    return [*pieces, line[start:]]
