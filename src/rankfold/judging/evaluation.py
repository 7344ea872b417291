"""``Evaluation``: any number of models on the same rows, each in numbers with intervals beside the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from rankfold.errors import ConfigError, DataError
from rankfold.judging.intervals import FEW_ROWS
from rankfold.judging.judged import MISSING, OnProgress, answered, judge
from rankfold.judging.loading import base_of, tuned_of
from rankfold.judging.measured import Measured, measured
from rankfold.judging.metrics import EvalRow, Judged, Metric
from rankfold.judging.names import short_names
from rankfold.judging.request import EvalRequest
from rankfold.judging.rows import EvalData, question_in_words
from rankfold.models.base.base import Base
from rankfold.models.choices import ModelRequest

REFERENCE = "base"  # the name of an adapter's base
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A row where the models differ, with what each answered and its own score by metric."""

    row: EvalRow
    prompt: str
    answers: dict[str, str]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models on the same rows, by name; the first is what the others are compared with."""

    data: EvalData
    judged: dict[str, Judged]
    measured: dict[str, list[Measured]]
    shown: list[Shown]
    source: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.judged)

    @property
    def main(self) -> Metric:
        """The metric that says most about the task."""
        return main_metric(self.data.metrics)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "data": self.source,
            "rows": len(self.data.rows),
            "kind": self.data.kind.name,
            "reason": self.data.kind.reason,
            "labels": list(self.data.labels) if self.data.kind.name == "labels" else [],
            "metrics": {
                metric.name: {"meaning": metric.meaning, "lower_is_better": metric.lower_is_better}
                for metric in self.data.metrics
            },
            "models": {
                name: {
                    "seconds": round(self.judged[name].seconds, 3),
                    "metrics": {each.metric.name: _numbers(each) for each in found},
                }
                for name, found in self.measured.items()
            },
            "notes": self.notes,
        }

    def row_lines(self) -> Iterator[dict[str, Any]]:
        """Each row with what every model did on it."""
        scores = {name: _row_scores(self.data, judged) for name, judged in self.judged.items()}
        for place, (row, example) in enumerate(zip(self.data.rows, self.data.examples, strict=True)):
            models = {
                name: {
                    **({"answer": judged.answers[place]} if judged.answers else {}),
                    **({"finish_reason": judged.finish_reasons[place]} if judged.answers else {}),
                    **({"choice": judged.chosen[place]} if judged.chosen else {}),
                    "scores": {metric: _finite(found[place]) for metric, found in scores[name].items()},
                }
                for name, judged in self.judged.items()
            }
            yield {"origin": row.origin, "prompt": example.prompt, "wanted": row.wanted, "models": models}


def main_metric(metrics: Sequence[Metric]) -> Metric:
    return next((metric for metric in metrics if metric.needs != "losses"), metrics[0])


def compare_models(
    request: EvalRequest,
    data: EvalData,
    models: Sequence[ModelRequest],
    on_model: Callable[[str], object] = lambda _: None,
    on_progress: OnProgress = lambda *_: None,
) -> Evaluation:
    """Judge ``models`` on ``data``, one after the other; where the first has an adapter, before it its base,
    asked in the same words.

    Rows that one of them cannot read or be asked count for none.  Raises RankfoldError."""
    notes = [*data.notes]
    judged: dict[str, Judged] = {}
    if request.answered:
        judged = {column: answered(data, column) for column in request.answered}
    for name, base in models_in_turn(models):
        on_model(name)
        notes += [note for note in base.notes if note not in notes]
        judged[name] = judge(base, data, request, on_progress)
    if not judged:
        raise ConfigError("nothing to judge: name adapters or models, or columns under --answered")
    places, told = _common(data, judged)
    data = data.only(places)
    judged = {name: _only(found, places) for name, found in judged.items()}
    notes += [*told, *_cut(judged)]
    notes += _without_effect(judged)
    if len(data.rows) < FEW_ROWS:
        notes.append(
            f"{len(data.rows)} rows are few: intervals are narrower than they should be below {FEW_ROWS}"
        )
    return Evaluation(
        data=data,
        judged=judged,
        measured=measured(data, judged, request.seed),
        shown=_shown(data, judged, request.shown),
        notes=notes,
    )


def _without_effect(judged: dict[str, Judged]) -> list[str]:
    """Which models say what the first says, to the last bit of every row's loss."""
    (first, before), *others = judged.items()
    alike = [
        name
        for name, found in others
        if before.tokens.any()
        and torch.equal(found.losses, before.losses)
        and found.answers == before.answers
    ]
    return [f"{name} is {first} to the bit on every row: its adapter has no effect" for name in alike]


def _cut(judged: dict[str, Judged]) -> list[str]:
    """Which models' answers were cut off, and may have been going to say more."""
    counts = {name: found.finish_reasons.count("length") for name, found in judged.items()}
    cut = [f"{count:,} of {name}" for name, count in counts.items() if count]
    return [f"answers cut off for their length (max_new_tokens): {', '.join(cut)}"] if cut else []


def models_in_turn(models: Sequence[ModelRequest]) -> Iterator[tuple[str, Base]]:
    """Each model by its name, loaded in its turn; where the first has an adapter, its base before it."""
    for name, asked in _named(models).items():
        yield name, base_of(asked) if name == REFERENCE and asked.adapter else tuned_of(asked)


def _named(models: Sequence[ModelRequest]) -> dict[str, ModelRequest]:
    """The models by the shortest names that tell them apart; an adapter's base first."""
    found = {REFERENCE: models[0]} if models and models[0].adapter is not None else {}
    names = short_names([asked.adapter or asked.model or "" for asked in models], found)
    return found | dict(zip(names, models, strict=True))


def _common(data: EvalData, judged: dict[str, Judged]) -> tuple[list[int], list[str]]:
    """The places of the rows that every model could read and be asked, and what is told of the others."""
    unread, unasked = [], []
    for place, row in enumerate(data.rows):
        if any(math.isnan(float(found.losses[place])) for found in judged.values()):
            unread.append(row.origin)
        elif any(
            found.finish_reasons and found.finish_reasons[place] == MISSING for found in judged.values()
        ):
            unasked.append(row.origin)
    left_out = {*unread, *unasked}
    places = [place for place, row in enumerate(data.rows) if row.origin not in left_out]
    if not places:
        raise DataError("no row is short enough to be read by every model, or has an answer of each")
    notes = []
    if unread:
        notes.append(f"{len(unread):,} rows left out, longer than a model reads: {unread[0]} ...")
    if unasked:
        notes.append(f"{len(unasked):,} rows left out, without an answer of every model: {unasked[0]} ...")
    return places, notes


def _only(judged: Judged, places: Sequence[int]) -> Judged:
    at = torch.tensor(places)

    def some(texts: list[str]) -> list[str]:
        return [texts[place] for place in places] if texts else []

    return replace(
        judged,
        losses=judged.losses[at],
        tokens=judged.tokens[at],
        text_bytes=judged.text_bytes[at],
        answers=some(judged.answers),
        finish_reasons=some(judged.finish_reasons),
        chosen=some(judged.chosen),
    )


def _row_scores(data: EvalData, judged: Judged) -> dict[str, list[float]]:
    return {metric.name: metric.scores(data.rows, judged).tolist() for metric in data.metrics}


def _shown(data: EvalData, judged: dict[str, Judged], most: int) -> list[Shown]:
    """The rows where the models' scores differ most, by the main metric and then by the loss."""
    main, loss = main_metric(data.metrics), data.metrics[0]
    spreads = [
        torch.stack([metric.scores(data.rows, each) for each in judged.values()]) for metric in (main, loss)
    ]
    by_main, by_loss = ((part.max(0).values - part.min(0).values).tolist() for part in spreads)
    order = sorted(range(len(data.rows)), key=lambda place: (-by_main[place], -by_loss[place]))
    scores = {name: _row_scores(data, each) for name, each in judged.items()}
    return [
        Shown(
            row=data.rows[place],
            prompt=question_in_words(data.examples[place]),
            answers={name: _said(each, main, place) for name, each in judged.items()},
            scores={
                name: {m: values[place] for m, values in found.items()} for name, found in scores.items()
            },
        )
        for place in order[:most]
    ]


def _said(judged: Judged, main: Metric, place: int) -> str:
    said = judged.chosen if main.needs == "choices" else judged.answers
    return said[place] if said else ""


def _numbers(each: Measured) -> dict[str, Any]:
    gap = each.gap and {name: _finite(value) for name, value in asdict(each.gap).items()}
    number = {name: _finite(value) for name, value in asdict(each.number).items()}
    return {**number, "gap": gap, "chance": each.chance, "verdict": each.verdict or None}


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
