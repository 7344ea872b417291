"""``export_adapter``: written, asked, certified; or nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankfold.data.shapes.example import Example
from rankfold.errors import DataError, ExportError, RankfoldError, bullet_list
from rankfold.export.card import write_card
from rankfold.export.certificate import Certificate, compare, sums_of
from rankfold.export.gguf_adapter import write_gguf_pairs
from rankfold.export.gguf_model import write_gguf_model
from rankfold.export.layouts import base_of, write_layout
from rankfold.export.merged import write_merged
from rankfold.export.ollama import write_for_ollama
from rankfold.export.probes import passed_over
from rankfold.export.request import ExportRequest
from rankfold.export.served import write_served
from rankfold.export.told import told_by
from rankfold.export.written import Written
from rankfold.files import staged_folder
from rankfold.judging.general_rows import general_rows
from rankfold.judging.request import EvalRequest
from rankfold.judging.rows import read_data, spread
from rankfold.models.base.load import load_tuned
from rankfold.models.base.precision import Precision
from rankfold.models.mlx.layout import is_mlx
from rankfold.train.asked.run_rows import is_run, rows_of_run
from rankfold.train.keeping.names import refuse_used_folder

CERTIFICATE = "certificate.json"
WRITERS: Mapping[str, Callable[[Path, ExportRequest, Path], Written]] = {
    "merged": write_merged,
    "gguf": write_gguf_model,
    "gguf-adapter": write_gguf_pairs,
    **dict.fromkeys(("ollama", "ollama-adapter"), write_for_ollama),
    **dict.fromkeys(("hf", "internvl", "mlx"), write_layout),
    **dict.fromkeys(("vllm", "sglang", "lmdeploy"), write_served),
}
MUCH = 0.3  # of the adapter's change


@dataclass(frozen=True)
class Exported:
    """What was written where, and how it was found to be; no certificate where none was asked for."""

    out: Path
    certificate: Certificate | None
    notes: list[str]


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    request: ExportRequest,
    tell: Callable[[str], object] = lambda _: None,
) -> Exported:
    """Write ``adapter`` to ``out`` as ``request`` says, and a certificate beside it.

    What was written is read by the program that it is for, and asked the same as the tuned model.  Raises
    ExportError where it says something else, and what else a RankfoldError tells; nothing is left then."""
    adapter, out = Path(adapter), Path(out)
    refuse_used_folder(out)
    examples, notes = _examples(adapter, request)
    with staged_folder(out) as staging:
        tell("writing the weights")
        written = WRITERS[request.to](adapter, request, staging)
        certificate = None
        if examples:
            certificate = _certified(adapter, request, written, examples, tell)
        write_card(adapter, request, staging, base_of(adapter, request), certificate)
        if certificate is not None:
            certificate.files = sums_of(staging)
            told = json.dumps(certificate.as_json(), indent=2, ensure_ascii=False)
            (staging / CERTIFICATE).write_text(told + "\n", encoding="utf-8")
    return Exported(out, certificate, [*notes, *written.notes, *_told_of(written)])


def _told_of(written: Written) -> list[str]:
    """What a user should know of the rounding."""
    lost = statistics.median(written.lost.values()) if written.lost else 0.0
    if lost < MUCH:
        return []
    return [
        f"the rounding to {written.numbers} is {lost:.0%} of the adapter's change of most layers: "
        f"{written.remedy}"
    ]


def _certified(
    adapter: Path,
    request: ExportRequest,
    written: Written,
    examples: Sequence[Example],
    tell: Callable[[str], object],
) -> Certificate:
    tell(f"asking the tuned model {len(examples)} prompts")
    allow, precision = request.allow, Precision.of("float32")
    tuned = load_tuned(adapter, request.model, allow, merged=False, precision=precision)  # type: ignore[arg-type]
    told, style = told_by(tuned, examples), tuned.prompt_style
    if not told:
        raise DataError(f"none of {len(examples)} prompts could be asked; name rows with --data")
    tried: tuple[int, list[str]] = (0, [])
    if written.probing is not None:
        tell(f"trying each module in {written.probing.engine.name}")
        tried = passed_over(tuned, max(told, key=lambda each: len(each.answer)), style, written.probing)
    del tuned
    judge = written.judge(style)
    tell(f"asking what was written, by {judge.name}")
    made = Certificate(request.to, judge.name, written.numbers, written.most_kl)
    made.modules_tried, made.passed_over = tried
    if written.lost:
        made.update_lost = statistics.median(written.lost.values())
        made.worst_layer = max(written.lost, key=written.lost.__getitem__)
        made.worst_lost = written.lost[made.worst_layer]
    made = compare(made, told, judge.says(told))
    if made.problems:
        remedy = [written.remedy] if written.remedy and made.update_lost > MUCH else []
        headline = (
            f"what was written as {request.to} says something else than the tuned model; it is removed:"
        )
        raise ExportError(bullet_list(headline, [*made.problems, *remedy]))
    return made


def _examples(adapter: Path, request: ExportRequest) -> tuple[list[Example], list[str]]:
    """The rows whose prompts are asked: named ones, those that the run held out, or general questions; and
    what should be known of them."""
    notes: list[str] = []
    if is_mlx(adapter):
        return [], ["no certificate: the tuned model is read by mlx alone; export what was written again"]
    if request.data is not None:
        rows: Sequence[Example] = read_data(EvalRequest.of({"data": request.data})).examples
        return spread(rows, request.prompts), []
    if is_run(adapter) and request.prompts:
        try:
            return spread(list(rows_of_run(adapter).held_out), request.prompts), []
        except RankfoldError as error:
            told = str(error).splitlines()[0]
            notes = [f"general questions are asked, as the run's own rows cannot be read: {told}"]
    questions = [row.example for row in general_rows() if row.example.messages]
    return spread(questions, request.prompts), notes
