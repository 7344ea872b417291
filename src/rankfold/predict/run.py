"""Answering a whole file: each row's answer is on disk as soon as it is there, and the file of all appears at
the end, whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from rankfold.data.reading.row import BadRow, Row
from rankfold.data.shapes.asked import question_of
from rankfold.errors import DataError, OutputError, bullet_list
from rankfold.files import require_space, whole_file
from rankfold.models.answering.answer import Answer
from rankfold.models.answering.asked import Question
from rankfold.predict.journal import Journal
from rankfold.predict.request import PredictRequest
from rankfold.predict.tables import write_rows

Answering = Callable[[Iterable[tuple[int, Question]]], Iterator[tuple[int, Answer]]]
MARK_LETTERS = 16
SPACE_BYTES = 10_000_000


@dataclass(frozen=True)
class AnswerColumns:
    """The columns beside those of the rows: ``name`` holds the answers, and the others' names begin so."""

    name: str
    several: bool = False
    logprobs: bool = False

    @property
    def names(self) -> list[str]:
        return [*self.of({"problem": ""}, 0)]

    def of(self, said: Mapping[str, Any], sample: int) -> dict[str, Any]:
        """What the journal holds of an answer, by column."""
        name = self.name
        return {
            **({f"{name}_sample": sample} if self.several else {}),
            name: None if said["problem"] else said.get("text"),
            f"{name}_finish_reason": said.get("finish_reason"),
            f"{name}_prompt_tokens": said.get("prompt_tokens"),
            f"{name}_tokens": said.get("tokens"),
            f"{name}_problem": said["problem"] or None,
            **({f"{name}_logprobs": said.get("logprobs")} if self.logprobs else {}),
        }


@dataclass
class Progress:
    """How far a run is: answers in all, those that were there before, and those of now with their tokens."""

    answers: int
    before: int
    done: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float:
        left = self.answers - self.before - self.done
        return self.seconds / self.done * left if self.done else float("inf")


@dataclass
class Predicted:
    """What was done: rows, how many answers ended how, tokens and seconds of this process, problems by row,
    and what a reader of the file should know."""

    out: Path
    rows: int
    ends: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    progress: Progress | None = None

    @property
    def status(self) -> int:
        """The exit status: 1 if a row has no answer."""
        return 1 if self.ends["error"] else 0


@dataclass(frozen=True)
class Rows:
    """The rows to be answered, read anew each time: there may be more than fit into memory; how many
    they are, and their columns."""

    request: PredictRequest
    count: int = 0
    columns: tuple[str, ...] = ()

    @classmethod
    def looked_at(cls, request: PredictRequest) -> Rows:
        """Raises DataError if no row asks anything, or the source cannot be read."""
        problems: list[str] = []
        columns: dict[str, None] = {}
        count = 0
        for count, (row, question) in enumerate(cls(request), start=1):  # noqa: B007 - the count is used
            columns |= dict.fromkeys(row.values if isinstance(row, Row) else ())
            if isinstance(question, str):
                problems.append(f"{row.origin}: {question}")
        if not count:
            raise DataError(f"{request.data} holds no rows")
        if len(problems) == count:
            raise DataError(bullet_list(f"no row of {request.data} can be answered:", problems))
        return cls(request, count, tuple(columns))

    def __iter__(self) -> Iterator[tuple[Row | BadRow, Question | str]]:
        """Each row with what it asks, or why it cannot."""
        request = self.request
        for row in request.source.rows():
            if isinstance(row, BadRow):
                yield row, row.problem
                continue
            try:
                yield row, question_of(row, request.shape, request.leave_out, request.system)
            except ValueError as error:
                yield row, str(error)


def refuse_taken(rows: Rows, columns: AnswerColumns) -> None:
    """Raise OutputError for a file that is there or cannot be written, and for columns that rows have."""
    out = rows.request.out
    if out.exists():
        raise OutputError(f"{out} exists; name another --out, or remove it first")
    require_space(out.parent, SPACE_BYTES)
    if taken := [name for name in columns.names if name in rows.columns]:
        raise OutputError(f"the rows have columns {taken} already; name another --column")


def predict(
    rows: Rows,
    columns: AnswerColumns,
    answering: Answering,
    identity: Mapping[str, Any],
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Predicted:
    """Answer all ``rows`` that have no answer yet, and write the file that they are asked for with.

    ``answering`` gives answers to numbered questions in any order; ``identity`` is what the answers hang on:
    those of an earlier run that was stopped count only if theirs was the same.  Raises OutputError."""
    request = rows.request
    refuse_taken(rows, columns)
    with Journal(request.out, identity, rows.count, request.samples).opened() as journal:
        progress = Progress(rows.count * request.samples, journal.answered)
        on_progress(progress)
        marks: dict[int, str] = {}
        started = time.perf_counter()
        for number, answer in answering(_missing(rows, request.samples, journal, marks)):
            journal.add(*divmod(number, request.samples), marks.pop(number), answer)
            progress.done += 1
            progress.tokens += len(answer.tokens)
            progress.seconds = time.perf_counter() - started
            on_progress(progress)
        predicted = Predicted(request.out, rows.count, progress=progress)
        _write(rows, columns, journal, predicted)
        journal.remove()
    return predicted


def _missing(
    rows: Rows, samples: int, journal: Journal, marks: dict[int, str]
) -> Iterator[tuple[int, Question]]:
    """The questions that have no answer yet, with their numbers; their marks are put into ``marks``."""
    for place, (_, question) in enumerate(rows):
        mark = _mark(question)
        for sample in range(samples):
            if journal.has(place, sample, mark):
                continue
            if isinstance(question, str):
                journal.add(place, sample, mark, Answer.missing(question))
                continue
            marks[place * samples + sample] = mark
            yield place * samples + sample, question


def _mark(question: Question | str) -> str:
    return sha256(repr(question).encode()).hexdigest()[:MARK_LETTERS]


def _write(rows: Rows, columns: AnswerColumns, journal: Journal, predicted: Predicted) -> None:
    samples = range(rows.request.samples)

    def answered() -> Iterator[dict[str, Any]]:
        for place, (row, _) in enumerate(rows):
            values = row.values if isinstance(row, Row) else {}
            for sample in samples:
                yield values | columns.of(journal.answer(place, sample), sample)

    for place, (row, _) in enumerate(rows):
        for sample in samples:
            said = journal.answer(place, sample)
            predicted.ends[said["finish_reason"]] += 1
            if said["problem"] and sample == 0:
                predicted.problems.append(f"{row.origin}: {said['problem']}")
    with whole_file(predicted.out) as file:
        predicted.notes = write_rows(predicted.out, file, answered, [*rows.columns, *columns.names])
