"""One pass over the rows of a file: each is looked at as it comes and then forgotten."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np

from rankfold.data.check.balance import Balance, language_of
from rankfold.data.check.hints import (
    KNOWN_SPECIAL_TOKENS,
    encoding_spans,
    excerpt,
    mask_personal,
    personal_spans,
    printable,
    special_token_pattern,
    special_token_spans,
)
from rankfold.data.check.ledger import Ledger
from rankfold.data.check.measure import CharacterMeter, Meter, TokenMeter, texts_of
from rankfold.data.check.picked import Picked
from rankfold.data.order.dedup import NearDuplicates
from rankfold.data.order.split import compared_words, fingerprint
from rankfold.data.reading.row import BadRow, Row
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.formats import named_shape
from rankfold.data.shapes.interpret import interpret
from rankfold.data.shapes.shape import Shape
from rankfold.data.shapes.sources import Source
from rankfold.errors import DataError
from rankfold.models.messages.images import ImageReader
from rankfold.models.messages.prompt import prompt_encoder

PROGRESS_ROWS = 10_000
HELD_OUT = -1  # where the row of a held-out example would stand


class Examination:
    """What is known of the rows so far; ``finish`` adds what only all of them together show."""

    def __init__(
        self, tokenizer: Any | None, *, shown: int = 0, seed: int = 0, reader: ImageReader | None = None
    ) -> None:
        self.reader = reader
        self.ledger = Ledger()
        self.balance = Balance()
        self.meter: Meter = CharacterMeter() if tokenizer is None else TokenMeter(tokenizer, reader)
        self.picked = Picked(shown, seed)
        self.parts: list[tuple[str, int, int]] = []  # each source, its first row and the one after its last
        self.unused: set[str] = set()  # columns and keys of turns
        self.held_out_rows = 0
        self.bad_held_out: list[str] = []
        self.unusual: dict[str, Example] = {}  # the first pair, judged answer, and row with pictures
        self._kinds: dict[str, str] = {}  # text or messages, and where the first of each stands
        self._copies = bytearray()  # 1 for a row that is an exact copy of an earlier or a held-out one
        spelt = KNOWN_SPECIAL_TOKENS if tokenizer is None else prompt_encoder(tokenizer).control
        self._special = special_token_pattern(spelt)
        self._near = NearDuplicates()
        self._compared = array("q")  # the row of each text in ``_near``, or HELD_OUT
        self._marks = array("Q")

    def _add(self, item: Row | BadRow, shape: Shape | None, leave_out: Collection[str]) -> None:
        row = self.ledger.open(item.origin)
        self._copies.append(0)
        example = self._interpreted(row, item, shape, leave_out)
        if example is None:
            return
        text = "\n".join(texts_of(example))
        spelt = special_token_spans(text, self._special)
        for span in (*personal_spans(text), *encoding_spans(text), *spelt):
            self.ledger.note(row, span[2], partial(excerpt, text, span))
        self.balance.add(example, language_of(text))
        if self.ledger.state(row) == "dropped":
            return
        self._compare(row, example)
        self.meter.add(row, example, exact=bool(spelt))
        self.picked.offer(example, len(text))

    def _interpreted(
        self, row: int, item: Row | BadRow, given: Shape | None, leave_out: Collection[str]
    ) -> Example | None:
        """The example, if the item is one; what is wrong goes into the ledger."""
        if isinstance(item, BadRow):
            self.ledger.drop(row, "unreadable", lambda: _shown(item.problem), stops=True)
            return None
        found = interpret(item, given, leave_out)
        example = found.example
        for problem in found.problems:
            shown = partial(_shown, problem.text)
            if problem.fatal:
                self.ledger.drop(row, problem.rule, shown, stops=True)
            else:
                self.ledger.note(row, problem.rule, shown)
        if example is not None:
            self.balance.shapes[found.shape] += 1
            self.unused.update(found.unused)
            self._kinds.setdefault("running text" if example.kind == "text" else "messages", item.origin)
            if example.kind in ("preference", "feedback"):
                self.unusual.setdefault(example.kind, example)
            if any(message.images for message in example.messages):
                self.unusual.setdefault("pictures", example)
        return example

    def read(self, source: Source, on_rows: Callable[[int], None] = lambda _: None) -> None:
        """Look at every row of ``source``.  Raises DataError if it holds none."""
        shape = named_shape(source.shape) if source.shape else None
        start = len(self.ledger)
        for item in source.rows():
            self._add(item, shape, source.leave_out)
            if len(self.ledger) % PROGRESS_ROWS == 0:
                on_rows(len(self.ledger))
        if len(self.ledger) == start:
            raise DataError(f"{source.path} holds no rows")
        self.parts.append((str(source.path), start, len(self.ledger)))

    def read_held_out(self, source: Source) -> None:
        """The rows that are judged on, not trained on.  They come before the first row."""
        shape = named_shape(source.shape) if source.shape else None
        for item in source.rows():
            problem = item.problem if isinstance(item, BadRow) else ""
            if isinstance(item, Row):
                found = interpret(item, shape, source.leave_out)
                problem = next((problem.text for problem in found.problems if problem.fatal), "")
                if found.example is not None and not problem:
                    self._compare(HELD_OUT, found.example)
            self.held_out_rows += 1
            if problem:
                self.bad_held_out.append(f"{item.origin}: {_shown(problem)}")

    @property
    def mixed(self) -> str:
        """That text stands beside messages, in words; empty if it does not."""
        return " beside ".join(f"{kind} ({origin})" for kind, origin in self._kinds.items()) * (
            len(self._kinds) > 1
        )

    def finish(self) -> None:
        """Find copies, near copies and leaks, and measure what is not measured yet."""
        self.meter.finish()
        for row, problem in self.meter.measured.refused:
            self.ledger.drop(row, "template", partial(_shown, problem), stops=True)
        self._note_copies()
        self._note_near_copies()

    def _compare(self, row: int, example: Example) -> None:
        self._near.add(compared_words(example))
        self._compared.append(row)
        self._marks.append(mark_of(example))

    def held_out_marks(self) -> set[int]:
        """The marks (see ``mark_of``) of the held-out rows."""
        return {mark for mark, row in zip(self._marks, self._compared, strict=True) if row == HELD_OUT}

    def _note_copies(self) -> None:
        """Of rows with the same fingerprint the first stays; held-out rows come before all others."""
        if not len(self._compared):
            return
        marks = np.frombuffer(self._marks, dtype=np.uint64)
        _, first, inverse = np.unique(marks, return_index=True, return_inverse=True)
        for place in np.flatnonzero(first[inverse] != np.arange(len(marks))).tolist():
            row = self._compared[place]
            original = self._compared[int(first[inverse[place]])]
            if row == HELD_OUT:
                continue
            self._copies[row] = 1
            if original == HELD_OUT:
                self.ledger.drop(row, "in-held-out", "a held-out row has the same words", stops=False)
            else:
                self.ledger.note(row, "duplicate", partial(self._like, "the same as", original))

    def _note_near_copies(self) -> None:
        for group in self._near.groups():
            rows = [self._compared[place] for place in group]
            judged = HELD_OUT in rows
            first = next(row for row in rows if row != HELD_OUT) if not judged else HELD_OUT
            for row in rows:
                if row in (HELD_OUT, first) or self._copies[row]:
                    continue
                if judged:
                    self.ledger.note(row, "near-held-out", "a held-out row is almost the same")
                else:
                    self.ledger.note(row, "near-duplicate", partial(self._like, "almost the same as", first))

    def _like(self, how: str, row: int) -> str:
        return f"{how} {self.ledger.origin(row)}"


def mark_of(example: Example) -> int:
    """64 bits of the row's fingerprint; of a million rows two differ with the same one in 1 of 10^7 files."""
    return int(fingerprint(example)[:16], 16)


def _shown(text: str) -> str:
    return printable(mask_personal(text))
