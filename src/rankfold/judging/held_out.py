"""Base against tuned on held-out rows, in numbers with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfold.data.tokens.encode import EncodedRow
from rankfold.judging.intervals import FEW_ROWS, interval, resampled


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Held-out loss in nats per trained token; ``gap`` = tuned - base, below zero when tuned is better,
    with its 95 % interval ``gap_low`` .. ``gap_high``.  ``base_rows`` and ``tuned_rows`` are each row's
    summed loss, ``row_weights`` what its tokens count."""

    rows: int
    trained_tokens: int
    base_loss: float
    tuned_loss: float
    gap: float
    gap_low: float
    gap_high: float
    rows_improved: int
    base_rows: list[float] = field(default_factory=list, repr=False)
    tuned_rows: list[float] = field(default_factory=list, repr=False)
    row_weights: list[float] = field(default_factory=list, repr=False)

    @property
    def base_perplexity(self) -> float:
        return math.exp(self.base_loss)

    @property
    def tuned_perplexity(self) -> float:
        return math.exp(self.tuned_loss)

    @property
    def verdict(self) -> str:
        if self.gap_high < 0:
            return "better on rows it has not seen"
        if self.gap_low > 0:
            return "worse on rows it has not seen"
        return "not told apart: the interval holds 0"

    @property
    def caution(self) -> str:
        """What weakens the verdict, or an empty string."""
        few = (
            f"{self.rows} held-out rows are few: the interval is narrower than it should be below {FEW_ROWS}"
        )
        return few if self.rows < FEW_ROWS else ""


def compare(rows: Sequence[EncodedRow], base: Tensor, tuned: Tensor, seed: int) -> Comparison:
    """Compare the row losses of two models on the same rows, with a paired bootstrap over rows."""
    counts = torch.tensor([row.weight for row in rows], dtype=torch.float64)
    sums = resampled(torch.stack([tuned - base, counts], dim=1), seed)
    total = float(counts.sum())
    gap = interval(float((tuned - base).sum()) / total, sums[:, 0] / sums[:, 1])
    return Comparison(
        rows=len(rows),
        trained_tokens=sum(row.trained_tokens for row in rows),
        base_loss=float(base.sum()) / total,
        tuned_loss=float(tuned.sum()) / total,
        gap=gap.value,
        gap_low=gap.low,
        gap_high=gap.high,
        rows_improved=int((tuned < base).sum()),
        base_rows=base.tolist(),
        tuned_rows=tuned.tolist(),
        row_weights=counts.tolist(),
    )
