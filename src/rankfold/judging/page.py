"""An evaluation on one page, in words and as files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rankfold.files import staged_folder
from rankfold.judging.evaluation import Evaluation
from rankfold.judging.intervals import Interval
from rankfold.judging.measured import Measured
from rankfold.judging.metrics import Metric
from rankfold.pages import render

PAGE_NAME, NUMBERS_NAME, ROWS_NAME = "report.html", "eval.json", "rows.jsonl"
VERSIONS_OF = ("rankfold", "torch", "transformers")
COLOURS = {"better": "good", "worse": "bad"}


@dataclass(frozen=True)
class Verdict:
    """One model beside the first, by the metric that says most, in one sentence."""

    name: str
    verdict: str
    rest: str

    @property
    def colour(self) -> str:
        return COLOURS.get(self.verdict, "")

    def __str__(self) -> str:
        return f"{self.name} is {self.verdict} {self.rest}"


@dataclass(frozen=True)
class Cell:
    """A number of one model, with its interval and the gap to the first, in words."""

    number: str
    interval: str
    gap: str = ""
    gap_interval: str = ""
    verdict: str = ""

    @property
    def colour(self) -> str:
        return COLOURS.get(self.verdict, "")


@dataclass(frozen=True)
class Line:
    name: str
    meaning: str
    lower_is_better: bool
    cells: list[Cell]


def verdicts(evaluation: Evaluation) -> list[Verdict]:
    """A sentence for each model but the first."""
    first, main = evaluation.names[0], evaluation.main
    found = []
    for name in evaluation.names[1:]:
        each = next(each for each in evaluation.measured[name] if each.metric.name == main.name)
        assert each.gap is not None
        before = next(e for e in evaluation.measured[first] if e.metric.name == main.name)
        verdict = each.verdict if each.verdict in COLOURS else f"{each.verdict} from {first}"
        than = f"than {first} " if each.verdict in COLOURS else ""
        numbers = f"{_number(main, before.number.value)} to {_number(main, each.number.value)}"
        gap = f"gap {_gap(main, each.gap.value)}, {_interval(main, each.gap, signed=True)}"
        found.append(Verdict(name, verdict, f"{than}by {main.name}: {numbers} ({gap})"))
    return found


def table(evaluation: Evaluation) -> list[Line]:
    """A line for each metric, a cell for each model."""
    return [
        Line(
            metric.name,
            metric.meaning,
            metric.lower_is_better,
            [_cell(evaluation.measured[name][place]) for name in evaluation.names],
        )
        for place, metric in enumerate(evaluation.data.metrics)
    ]


def _cell(each: Measured) -> Cell:
    metric = each.metric
    number, around = _number(metric, each.number.value), _interval(metric, each.number)
    if each.gap is None:
        return Cell(number, around)
    return Cell(
        number,
        around,
        _gap(metric, each.gap.value),
        _interval(metric, each.gap, signed=True),
        each.verdict,
    )


def _number(metric: Metric, value: float) -> str:
    return f"{100 * value:.1f} %" if metric.is_share else f"{value:.4g}"


def _gap(metric: Metric, value: float) -> str:
    return f"{100 * value:+.1f}" if metric.is_share else f"{value:+.3g}"


def _interval(metric: Metric, each: Interval, signed: bool = False) -> str:
    factor = 100 if metric.is_share else 1
    form = ("+.1f" if signed else ".1f") if metric.is_share else ("+.3g" if signed else ".4g")
    return f"{factor * each.low:{form}} to {factor * each.high:{form}}"


def render_evaluation(evaluation: Evaluation) -> str:
    scored = {metric.name for metric in evaluation.data.metrics if metric.needs != "losses"}
    return render(
        "rankfold.judging",
        "page.html.j2",
        VERSIONS_OF,
        evaluation=evaluation,
        names=evaluation.names,
        table=table(evaluation),
        verdicts=verdicts(evaluation),
        shown_metrics={"loss", *(name for name in scored if not name.endswith("macro_f1"))},
    )


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """``out`` with the page, the numbers and the rows, whole or not at all.  Raises OutputError."""
    with staged_folder(out) as staging:
        numbers = json.dumps(evaluation.as_json(), indent=2, ensure_ascii=False)
        (staging / NUMBERS_NAME).write_text(f"{numbers}\n", encoding="utf-8")
        with (staging / ROWS_NAME).open("w", encoding="utf-8") as file:
            for line in evaluation.row_lines():
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
        (staging / PAGE_NAME).write_text(render_evaluation(evaluation), encoding="utf-8")
