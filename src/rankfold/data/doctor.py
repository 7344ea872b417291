"""``check``: everything that can be said of the rows before a run, and a ledger of what becomes of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rankfold.data.balance import Lengths, summarise
from rankfold.data.encode import encode, marked_pieces
from rankfold.data.examination import Examination
from rankfold.data.fixed import FixedFile, write_fixed
from rankfold.data.formats import named_shape
from rankfold.data.hints import mask_personal
from rankfold.data.report import OK, UNREADABLE, WOULD_STOP, Proof, Report
from rankfold.data.rows import stream_rows
from rankfold.errors import DataError, OutputError, bullet_list
from rankfold.files import whole_file, write_whole
from rankfold.models.load import load_tokenizer
from rankfold.settings import CheckedSettings

PROGRESS_ROWS = 10_000
MOST_LISTED = 20  # languages and labels; the rest are counted together


class CheckRequest(CheckedSettings):
    """What to check and what to write.  Build it with ``CheckRequest.of`` to get every mistake at once."""

    data: str = Field(min_length=1, description="rows to check: a file, a folder or a hub data set")
    model: str | None = Field(None, min_length=1, description="count tokens as this model does")
    shape: str | None = Field(
        None, min_length=1, description="the shape of the rows, or their columns [detected]"
    )
    held_out: str | None = Field(
        None, min_length=1, description="rows to judge on; rows that are there too are leaks"
    )
    max_length: int | None = Field(None, ge=8, description="longest row in tokens [by the 99th percentile]")
    skip_bad: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="share of bad rows to leave out"
    )
    show: int = Field(0, ge=0, le=100, description="show the trained tokens of so many rows; needs --model")
    html: Path | None = Field(None, description="write the report as a page")
    json_out: Path | None = Field(None, description="write the report for programs")
    ledger: Path | None = Field(None, description="write a line for every row: origin, state, reason")
    fix: Path | None = Field(None, description="write the rows, mended where they can be; a new .jsonl file")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the rows that are shown")

    @model_validator(mode="after")
    def _tokens_need_a_model(self) -> CheckRequest:
        if self.model is None and (self.show or self.max_length):
            raise ValueError("show and max_length are about tokens: name the model")
        return self

    def outputs(self) -> list[Path]:
        """The files that are to be written."""
        return [path for path in (self.html, self.json_out, self.ledger, self.fix) if path is not None]


def check(request: CheckRequest, on_rows: Callable[[int], None] = lambda _: None) -> Report:
    """Look at every row of ``request.data`` once, in bounded memory, and write the files asked for.

    ``on_rows`` hears from time to time how many rows were seen.  Raises DataError if the source holds no
    rows or cannot be read at all, ModelError, and OutputError for a place that must not be written."""
    started = time.perf_counter()
    _check_outputs(request)
    tokenizer, longest = load_tokenizer(request.model) if request.model else (None, None)
    shape = named_shape(request.shape) if request.shape else None
    examination = Examination(tokenizer, shape, shown=request.show, seed=request.seed)
    if request.held_out:
        examination.read_held_out(request.held_out)
    for number, item in enumerate(stream_rows(request.data), start=1):
        examination.add(item)
        if number % PROGRESS_ROWS == 0:
            on_rows(number)
    if not len(examination.ledger):
        raise DataError(f"{request.data} holds no rows")
    examination.finish()
    lengths = _choose_length(examination, longest, request.max_length)
    fixed = write_fixed(request.data, request.fix, examination) if request.fix else None
    report = _report(request, examination, lengths, fixed, _proofs(examination, tokenizer))
    report.seconds = time.perf_counter() - started
    _write(request, report, examination)
    return report


def _check_outputs(request: CheckRequest) -> None:
    """Raise OutputError for outputs that must not or cannot be written, all of them at once."""
    outputs = request.outputs()
    problems = [problem for path in outputs if (problem := _why_not(path, request))]
    twice = sorted({str(path) for path in outputs if outputs.count(path) > 1})
    problems += [f"{path} is named for two outputs; name two files" for path in twice]
    if request.fix and request.fix.suffix != ".jsonl":
        problems.append(f"{request.fix} does not end in .jsonl, which is what --fix writes")
    elif request.fix and request.fix.exists():
        problems.append(f"{request.fix} exists; name a new file for the mended rows, or remove it first")
    if problems:
        raise OutputError(problems[0] if len(problems) == 1 else bullet_list("cannot write:", problems))


def _why_not(path: Path, request: CheckRequest) -> str:
    """Why ``path`` cannot be an output, or an empty string."""
    for source in (Path(source) for source in (request.data, request.held_out) if source):
        same = source.exists() and path.exists() and source.samefile(path)
        if same or (source.is_dir() and path.resolve().is_relative_to(source.resolve())):
            return f"{path} is, or lies in, the data to check; name another file"
    if path.is_dir():
        return f"{path} is a folder; name a file"
    return "" if path.parent.is_dir() else f"{path.parent}, where {path.name} belongs, is no folder"


def _choose_length(examination: Examination, longest: int | None, asked: int | None) -> Lengths | None:
    """Describe the lengths and, if they are in tokens, cut or drop what is over the chosen one."""
    measured, unit = examination.meter.measured, examination.meter.unit
    lengths = summarise(measured.lengths, unit, longest, asked)
    if lengths is None or unit != "tokens":
        return lengths
    for row, length, shortest in zip(measured.rows, measured.lengths, measured.shortest, strict=True):
        if length > lengths.cut:
            shown = f"{length:,} tokens, more than {lengths.cut:,}"
            if shortest > lengths.cut:
                examination.ledger.drop(row, "over-length", shown, stops=False)
            else:
                examination.ledger.cut(row, "partly-over-length", shown)
    return lengths


def _proofs(examination: Examination, tokenizer: Any) -> list[Proof]:
    proofs = []
    for example in examination.picked.examples():
        try:
            row = encode(example, tokenizer)
        except DataError:
            continue  # it stands in the ledger as refused
        pieces = [(mask_personal(text), trained) for text, trained in marked_pieces(row, tokenizer)]
        proofs.append(Proof(origin=row.origin, tokens=len(row), trained=row.trained_tokens, pieces=pieces))
    return proofs


def _report(
    request: CheckRequest,
    examination: Examination,
    lengths: Lengths | None,
    fixed: FixedFile | None,
    proofs: list[Proof],
) -> Report:
    ledger, balance = examination.ledger, examination.balance
    status, verdict = _verdict(examination, request.skip_bad)
    return Report(
        name=request.data,
        model=request.model,
        shapes=balance.shapes.most_common(MOST_LISTED),
        states=list(ledger.counts().items()),
        reasons=sorted(ledger.reasons().items(), key=lambda reason: -reason[1]),
        findings=sorted(ledger.findings.values(), key=lambda f: (not f.stops, f.state == "kept", -f.rows)),
        lengths=lengths,
        languages=_listed(balance.languages, 0),
        labels=_listed(balance.labels, balance.other_labels),
        status=status,
        verdict=verdict,
        notes=examination.notes,
        fixed=fixed,
        proofs=proofs,
    )


def _listed(counter: Any, others: int) -> list[tuple[str, int]]:
    """The commonest first; at most MOST_LISTED, and one more for all others."""
    most = [(mask_personal(name), count) for name, count in counter.most_common(MOST_LISTED)]
    others += counter.total() - sum(count for _, count in most)
    return [*most, ("all others", others)] if others else most


def _verdict(examination: Examination, skip_bad: float) -> tuple[int, str]:
    """Exit status and the reason for it: would a run with this ``skip_bad`` start?"""
    ledger = examination.ledger
    rows, stopping = len(ledger), ledger.stopping_rows()
    unreadable = ledger.reasons().get(("dropped", "unreadable"), 0)
    dropped = ledger.counts()["dropped"]
    if unreadable > skip_bad * rows:
        return UNREADABLE, f"Training would stop: {unreadable:,} of {rows:,} rows cannot be read."
    if stopping > skip_bad * rows:
        return WOULD_STOP, f"Training would stop: {stopping:,} of {rows:,} rows break its rules."
    if dropped == rows:
        return WOULD_STOP, "Training would stop: no row is left."
    if examination.bad_held_out:
        bad = examination.bad_held_out
        return WOULD_STOP, f"Training would stop: {len(bad):,} held-out rows cannot be used, first {bad[0]}"
    if examination.mixed:
        return WOULD_STOP, f"Training would stop: {examination.mixed}; split the data."
    left_out = f"; {dropped:,} of {rows:,} rows are left out" if dropped else ""
    return OK, f"Nothing here would stop training{left_out}."


def _write(request: CheckRequest, report: Report, examination: Examination) -> None:
    if request.ledger:
        with whole_file(request.ledger) as file:
            for line in examination.ledger.lines():
                file.write(f"{line}\n".encode())
    if request.html:
        from rankfold.data.doctor_page import render_page

        write_whole(request.html, render_page(report))
    if request.json_out:
        text = json.dumps(report.as_json(), indent=2, ensure_ascii=True)
        write_whole(request.json_out, text + "\n")
