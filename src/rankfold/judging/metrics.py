"""What a model is measured by, each as a function of sums over rows, so that one bootstrap serves all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rankfold.judging.scores import SCORES, Score, by_pattern, normal

Needs = Literal["losses", "answers", "choices"]


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """A row to judge on: where it stands, what is wanted, its own values if they are known, and the choices
    that it gives itself."""

    origin: str
    wanted: str
    values: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()


@dataclass(eq=False, kw_only=True)
class Judged:
    """What a model did on rows, each list in their order: the summed loss in nats of the trained tokens, how
    many these are and their bytes as text; its answers; the choice that it holds for the likeliest."""

    losses: Tensor
    tokens: Tensor
    text_bytes: Tensor
    answers: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    seconds: float = 0.0


Rows = Sequence[EvalRow]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """``scores`` gives each row's own number (rows), ``terms`` (rows, terms) whose sums (..., terms) give the
    model's number by ``value``."""

    name: str
    meaning: str
    needs: Needs
    scores: Callable[[Rows, Judged], Tensor]
    terms: Callable[[Rows, Judged], Tensor]
    value: Callable[[Tensor], Tensor]
    lower_is_better: bool = False
    is_share: bool = True


def ratio(sums: Tensor) -> Tensor:
    above, below = sums.unbind(-1)
    return above / below


def macro_f1(sums: Tensor) -> Tensor:
    """The mean over the labels that occur of 2 hits / (2 hits + false alarms + misses); ``sums`` (..., 3
    labels) are hits, answers and wanted of each label."""
    hits, said, wanted = sums.unflatten(-1, (3, -1)).unbind(-2)
    both = said + wanted
    found: Tensor = (2 * hits / both.clamp(min=1)).sum(-1) / (both > 0).sum(-1).clamp(min=1)
    return found


def _of_loss(name: str) -> Metric:
    def terms(_: Rows, judged: Judged) -> Tensor:
        if name == "bits_per_byte":
            return torch.stack([judged.losses / math.log(2), judged.text_bytes], dim=1)
        return torch.stack([judged.losses, judged.tokens], dim=1)

    def value(sums: Tensor) -> Tensor:
        found = ratio(sums)
        return torch.exp(found) if name == "perplexity" else found

    return Metric(
        name=name,
        meaning=LOSSES[name],
        needs="losses",
        scores=lambda rows, judged: value(terms(rows, judged)),
        terms=terms,
        value=value,
        lower_is_better=True,
        is_share=False,
    )


def mean_metric(
    name: str, meaning: str, scores: Callable[[Rows, Judged], Tensor], needs: Needs = "answers"
) -> Metric:
    """The mean over rows of their ``scores``."""

    def terms(rows: Rows, judged: Judged) -> Tensor:
        found = scores(rows, judged)
        return torch.stack([found, torch.ones_like(found)], dim=1)

    return Metric(name=name, meaning=meaning, needs=needs, scores=scores, terms=terms, value=ratio)


def of_score(name: str, meaning: str, score: Score) -> Metric:
    """The mean over rows of what ``score`` gives an answer beside the one wanted."""

    def scores(rows: Rows, judged: Judged) -> Tensor:
        pairs = zip(judged.answers, rows, strict=True)
        return torch.tensor([score(answer, row.wanted) for answer, row in pairs], dtype=torch.float64)

    return mean_metric(name, meaning, scores)


def _of_labels(name: str, labels: Sequence[str]) -> Metric:
    needs: Needs = "choices" if name.startswith("choice") else "answers"
    places = {normal(label): place for place, label in enumerate(labels)}

    def said(judged: Judged) -> list[str]:
        return judged.chosen if needs == "choices" else judged.answers

    def hits(rows: Rows, judged: Judged) -> Tensor:
        found = [normal(text) == normal(row.wanted) for text, row in zip(said(judged), rows, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    def counts(rows: Rows, judged: Judged) -> Tensor:
        given = _one_hot([places.get(normal(text)) for text in said(judged)], len(labels))
        wanted = _one_hot([places.get(normal(row.wanted)) for row in rows], len(labels))
        return torch.cat([given * wanted, given, wanted], dim=1)

    if not name.endswith("macro_f1"):
        return mean_metric(name, LABELS[name], hits, needs)
    return Metric(name=name, meaning=LABELS[name], needs=needs, scores=hits, terms=counts, value=macro_f1)


def _one_hot(places: Sequence[int | None], labels: int) -> Tensor:
    table = torch.zeros(len(places), labels, dtype=torch.float64)
    for row, place in enumerate(places):
        if place is not None:
            table[row, place] = 1
    return table


LOSSES = {
    "loss": "nats per token of the answers",
    "perplexity": "e to the loss",
    "bits_per_byte": "loss in bits per byte of the answers' text, whatever the tokenizer",
}
LABELS = {
    "accuracy": "answers that are the label",
    "macro_f1": "mean over the labels of the F1 of each, by the answers",
    "choice": "the right one is the likeliest",
    "choice_macro_f1": "mean over the labels of the F1 of each, by likelihood",
}
MEANINGS = {
    "exact": "the answer is the one wanted, but for case, spaces and marks at its ends",
    "number": "the last number is the one wanted",
    "f1": "F1 of the words of answer and wanted",
    "rouge_l": "ROUGE-L: longest common subsequence of words",
    "chrf": "chrF: character n-grams",
    "json_valid": "the answer is JSON",
    "json_fields": "F1 of the fields of the JSON",
}
PATTERN, FUNCTION = "pattern", "function"
NAMES = (*LOSSES, *MEANINGS, *LABELS, PATTERN, FUNCTION)


def metric_of(name: str, labels: Sequence[str] = ()) -> Metric:
    """The metric of that name; ``labels`` are those that answers are compared with."""
    if name in LOSSES:
        return _of_loss(name)
    if name in LABELS:
        return _of_labels(name, labels)
    return of_score(name, MEANINGS[name], SCORES[name])


def pattern_metric(pattern: re.Pattern[str]) -> Metric:
    return of_score(PATTERN, f"what {pattern.pattern} finds last is the same", by_pattern(pattern))
