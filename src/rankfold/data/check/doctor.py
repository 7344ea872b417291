"""``check``: everything that can be said of the rows before a run, and a ledger of what becomes of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from rankfold.data.check.balance import Lengths, summarise
from rankfold.data.check.examination import Examination
from rankfold.data.check.fixed import FixedFile, write_fixed
from rankfold.data.check.hints import mask_personal
from rankfold.data.check.report import OK, UNREADABLE, WOULD_STOP, Report
from rankfold.data.order.split import HELD_OUT_MOST, HELD_OUT_SHARE, how_many
from rankfold.data.shapes.convert import refuse_untrainable
from rankfold.data.shapes.sources import Encoding, LeftOut, Source, sources_of
from rankfold.data.tokens.encode import encode_each
from rankfold.data.tokens.proof import MaskProof, prove_mask
from rankfold.errors import DataError, OutputError, bullet_list
from rankfold.files import whole_file, write_whole
from rankfold.models.base.text_side import load_text
from rankfold.models.messages.images import image_reader
from rankfold.settings import CheckedSettings

MOST_LISTED = 20  # languages and labels; the rest are counted together


class CheckRequest(CheckedSettings):
    """What to check and what to write.  Build it with ``CheckRequest.of`` to get every mistake at once."""

    data: str = Field(
        min_length=1, description="rows to check: file, folder, hub data set, or several with weights"
    )
    model: str | None = Field(None, min_length=1, description="count tokens as this model does")
    shape: str | None = Field(
        None, min_length=1, description="the shape of the rows, or their columns [detected]"
    )
    encoding: Encoding = Field(None, description="encoding of text files [UTF-8, or what their bytes tell]")
    leave_out: LeftOut = Field(
        [], description="columns, and kinds of parts of messages, to pass over, with commas between them"
    )
    held_out: Annotated[float | str | None, BeforeValidator(how_many)] = Field(
        None, description="rows to judge on; rows that are there too are leaks; or the share that a run takes"
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

    def sources(self) -> list[Source]:
        return sources_of(self.data, self.shape, self.encoding, self.leave_out)

    def held_out_sources(self) -> list[Source]:
        if not isinstance(self.held_out, str):
            return []
        return sources_of(self.held_out, self.shape, self.encoding, self.leave_out)

    def outputs(self) -> list[Path]:
        """The files that are to be written."""
        return [path for path in (self.html, self.json_out, self.ledger, self.fix) if path is not None]


def check(request: CheckRequest, on_rows: Callable[[int], None] = lambda _: None) -> Report:
    """Look at every row of ``request.data`` once, in bounded memory, and write the files asked for.

    ``on_rows`` hears from time to time how many rows were seen.  Raises DataError if the source holds no
    rows or cannot be read at all, ModelError, and OutputError for a place that must not be written."""
    started = time.perf_counter()
    _check_outputs(request)
    tokenizer, processor, longest = load_text(request.model) if request.model else (None, None, None)
    reader = None if processor is None else image_reader(processor)
    examination = Examination(tokenizer, shown=request.show, seed=request.seed, reader=reader)
    sources = request.sources()
    for source in request.held_out_sources():
        examination.read_held_out(source)
    for source in sources:
        examination.read(source, on_rows)
    examination.finish()
    lengths = _choose_length(examination, longest, request.max_length)
    fixed = write_fixed(sources, request.fix, examination) if request.fix else None
    proof = _proof(examination, tokenizer, request.seed) if request.show else None
    report = _report(request, examination, lengths, fixed, proof)
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
    for source in (Path(source.path) for source in (*request.sources(), *request.held_out_sources())):
        same = source.exists() and path.exists() and source.samefile(path)
        if same or (source.is_dir() and path.resolve().is_relative_to(source.resolve())):
            return f"{path} is, or lies in, the data to check; name another file"
    if path.is_dir():
        return f"{path} is a folder; name a file"
    return "" if path.parent.is_dir() else f"{path.parent}, where {path.name} belongs, is no folder"


def _choose_length(examination: Examination, longest: int | None, asked: int | None) -> Lengths | None:
    """Describe the lengths and, if they are in tokens, cut or drop what is over the chosen one."""
    measured, unit = examination.meter.measured, examination.meter.unit
    if not measured.lengths:
        return None
    lengths = summarise(measured.lengths, unit, longest, asked)
    if unit != "tokens":
        return lengths
    for row, length, shortest in zip(measured.rows, measured.lengths, measured.shortest, strict=True):
        if length > lengths.cut:
            shown = f"{length:,} tokens, more than {lengths.cut:,}"
            if shortest > lengths.cut:
                examination.ledger.drop(row, "over-length", shown, stops=False)
            else:
                examination.ledger.cut(row, "partly-over-length", shown)
    return lengths


def _proof(examination: Examination, tokenizer: Any, seed: int) -> MaskProof | None:
    """The mask of the picked rows, with personal data masked, and the counts of all rows."""
    picked = examination.picked
    encoded = [
        rows
        for _, rows in encode_each(picked.examples(), tokenizer, reader=examination.reader)
        if not isinstance(rows, DataError)
    ]
    if not encoded:
        return None
    proof = prove_mask([row for rows in encoded for row in rows], tokenizer, picked.count, seed)
    shown = [
        replace(
            row,
            why=row.why if row.why == "by chance" else f"{row.why} in characters",
            pieces=[(mask_personal(text), trained) for text, trained in row.pieces],
        )
        for row in proof.shown
    ]
    measured = examination.meter.measured
    return replace(
        proof,
        rows=len(measured.rows),
        tokens=sum(measured.lengths),
        trained_tokens=measured.trained,
        shown=shown,
    )


def _report(
    request: CheckRequest,
    examination: Examination,
    lengths: Lengths | None,
    fixed: FixedFile | None,
    proof: MaskProof | None,
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
        notes=_notes(request, examination, request.sources()),
        fixed=fixed,
        proof=proof,
    )


def _listed(counter: Any, others: int) -> list[tuple[str, int]]:
    """The commonest first; at most MOST_LISTED, and one more for all others."""
    most = [(mask_personal(name), count) for name, count in counter.most_common(MOST_LISTED)]
    others += counter.total() - sum(count for _, count in most)
    return [*most, ("all others", others)] if others else most


def _verdict(examination: Examination, skip_bad: float) -> tuple[int, str]:
    """Exit status and the reason for it: would a run with this ``skip_bad`` start?"""
    ledger = examination.ledger
    rows, dropped = len(ledger), ledger.counts()["dropped"]
    for name, start, end in examination.parts:
        stopping = {
            rule: count
            for (_, rule), count in ledger.reasons(start, end).items()
            if ledger.findings[rule].stops
        }
        bad, unreadable = sum(stopping.values()), stopping.get("unreadable", 0)
        if bad > skip_bad * (end - start):
            of = f" of {name}" if len(examination.parts) > 1 else ""
            read = f", {unreadable:,} of them not even read" if unreadable else ""
            status = UNREADABLE if unreadable > skip_bad * (end - start) else WOULD_STOP
            return status, f"Training would stop: {bad:,} of {end - start:,} rows{of} cannot be used{read}."
    if stop := _other_stop(examination, skip_bad):
        return WOULD_STOP, f"Training would stop: {stop}."
    if dropped == rows:
        return WOULD_STOP, "Training would stop: no row is left."
    left_out = f"; {dropped:,} of {rows:,} rows are left out" if dropped else ""
    return OK, f"Nothing here would stop training{left_out}."


def _other_stop(examination: Examination, skip_bad: float) -> str:
    """Why a run would stop whatever is skipped, or an empty string."""
    if refused := examination.meter.measured.refused:
        return f"{len(refused):,} rows cannot be encoded for this model"
    bad = examination.bad_held_out
    if len(bad) > skip_bad * examination.held_out_rows:
        return f"{len(bad):,} held-out rows cannot be used, first {bad[0]}"
    if examination.mixed:
        return f"{examination.mixed}; split the data"
    try:
        refuse_untrainable(examination.unusual.values(), sees_images=examination.reader is not None)
    except DataError as error:
        return str(error)
    return ""


def _notes(request: CheckRequest, examination: Examination, sources: list[Source]) -> list[str]:
    notes = []
    if isinstance(request.held_out, float):
        share = request.held_out
        told = f"{share:,.0f} rows" if share >= 1 else f"{100 * share:g} % of the rows"
        notes.append(f"a run holds out {told}, and never puts copies or near copies on both sides")
    elif request.held_out:
        count = examination.held_out_rows
        notes.append(f"the rows were compared with {count:,} held-out rows of {request.held_out}")
    else:
        notes.append(
            f"a run without --held-out holds out {100 * HELD_OUT_SHARE:g} % of the rows, at most "
            f"{HELD_OUT_MOST}, and never puts copies or near copies on both sides"
        )
    if examination.unused:
        names = sorted(examination.unused)
        more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
        notes.append(f"not used: {', '.join(names[:MOST_LISTED])}{more}")
    notes += [f"{source.path}: not done: {source.left_out}" for source in sources if source.left_out]
    if any(source.weight != 1 for source in sources):
        notes.append("every row was looked at once, whatever the weight of its source")
    return notes


def _write(request: CheckRequest, report: Report, examination: Examination) -> None:
    if request.ledger:
        with whole_file(request.ledger) as file:
            for line in examination.ledger.lines():
                file.write(f"{line}\n".encode())
    if request.html:
        from rankfold.data.check.doctor_page import render_page

        write_whole(request.html, render_page(report))
    if request.json_out:
        text = json.dumps(report.as_json(), indent=2, ensure_ascii=True)
        write_whole(request.json_out, text + "\n")
