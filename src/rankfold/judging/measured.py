"""What models are measured at: each metric with its interval, and beside the first model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.judging.intervals import CONFIDENCE, Interval, interval, resampled, sign_test, wilson
from rankfold.judging.metrics import Judged, Metric
from rankfold.judging.rows import EvalData


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A metric of one model: its number, and the gap to the first model's, both with intervals; no gap for
    the first itself.  The gap is on the same rows, drawn together.  ``chance``: of rows that are right or
    wrong, how likely so uneven changes are by chance (see ``sign_test``)."""

    metric: Metric
    number: Interval
    gap: Interval | None = None
    chance: float | None = None

    @property
    def verdict(self) -> str:
        if self.gap is None:
            return ""
        if self.gap.low == self.gap.high == 0:
            return "the same"
        if self.gap.holds_zero or (self.chance is not None and self.chance >= 1 - CONFIDENCE):
            return "not told apart"
        return "better" if (self.gap.value < 0) == self.metric.lower_is_better else "worse"


def measured(data: EvalData, judged: dict[str, Judged], seed: int) -> dict[str, list[Measured]]:
    """Every metric of every model, all on the same draws of rows."""
    found: dict[str, list[Measured]] = {}
    first: list[Drawn] = []
    for name, each in judged.items():
        terms = [metric.terms(data.rows, each) for metric in data.metrics]
        sums = resampled(torch.cat(terms, dim=1), seed).split([part.shape[1] for part in terms], dim=1)
        own = [
            Drawn(metric, metric.value(part.sum(0)), metric.value(over), metric.scores(data.rows, each))
            for metric, part, over in zip(data.metrics, terms, sums, strict=True)
        ]
        first = first or own
        found[name] = [mine.beside(theirs) for mine, theirs in zip(own, first, strict=True)]
    return found


@dataclass(frozen=True, eq=False)
class Drawn:
    """A metric of one model on all rows, on each draw of them (draws), and of each row (rows)."""

    metric: Metric
    value: Tensor
    over: Tensor
    scores: Tensor

    def beside(self, first: Drawn) -> Measured:
        number = self._number()
        if first is self:
            return Measured(metric=self.metric, number=number)
        gap = interval(float(self.value - first.value), self.over - first.over)
        chance = sign_test(self.scores - first.scores) if self._is_counted and first._is_counted else None
        return Measured(metric=self.metric, number=number, gap=gap, chance=chance)

    @property
    def _is_counted(self) -> bool:
        """Whether rows are right or wrong, and the number is the share of the right ones."""
        is_mean = torch.isclose(self.value, self.scores.mean())
        return bool(((self.scores == 0) | (self.scores == 1)).all() and is_mean)

    def _number(self) -> Interval:
        if self.metric.is_share and self._is_counted:
            return wilson(float(self.scores.sum()), len(self.scores))
        return interval(float(self.value), self.over)
