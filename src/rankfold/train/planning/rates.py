"""Learning rates that were tried, and which of them is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.judging.intervals import Interval, interval, resampled


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A rate after a few steps: its loss on rows that no step saw, in nats a token, and the gap to the usual
    rate's with its interval; None for the usual rate itself, and for one that broke off."""

    rate: float
    loss: float
    gap: Interval | None = None
    problem: str = ""


@dataclass(frozen=True)
class Probe:
    """Rates that were tried from one start on the same rows for so many ``steps``: the ``best`` there, and
    the one that is ``chosen`` for the whole run, with the reason."""

    tried: list[Tried]
    steps: int
    rows: int
    usual: float
    best: float
    chosen: float
    reason: str

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Probe:
        """From its record in JSON."""
        tried = [Tried(**each | {"gap": each["gap"] and Interval(**each["gap"])}) for each in told["tried"]]
        return cls(**{**told, "tried": tried})


def choose(
    losses: Mapping[float, Tensor | str], counts: Tensor, usual: float, steps: tuple[int, int], seed: int
) -> Probe:
    """The usual rate unless another's loss is lower by more than chance; of those the one with the lowest.

    ``losses`` are those of rows (rows) whose tokens count ``counts``, or why a rate broke off; ``steps`` are
    those of the probe and of the run.  A run of more steps goes as far at a lower rate: of a higher one than
    the usual it takes the best times the root of the shares of steps, and the usual one at least."""
    before = losses[usual]
    tried = [_beside(rate, found, before, counts, seed) for rate, found in losses.items()]
    after = f"after {steps[0]} steps, on {len(counts)} rows that none of them saw"
    if isinstance(before, str):
        whole = [each for each in tried if not each.problem]
        best = min(whole, key=lambda each: each.loss).rate if whole else usual
        reason = f"the best of those that went on; the usual {usual:g} broke off: {before}"
        return Probe(tried, steps[0], len(counts), usual, best, best, reason)
    better = [each for each in tried if each.gap is not None and each.gap.high < 0]
    if not better:
        reason = f"the usual one: no other of {len(losses)} was clearly better {after}"
        return Probe(tried, steps[0], len(counts), usual, usual, usual, reason)
    first = min(better, key=lambda each: each.loss)
    assert first.gap is not None
    rate = first.rate
    told = f"{first.gap.value:+.3f} nats a token ({first.gap.low:+.3f} to {first.gap.high:+.3f})"
    reason = f"{rate:g} was clearly better than the usual {usual:g} {after}: {told}"
    if rate > usual and steps[1] > steps[0]:
        rate = float(f"{max(usual, rate * math.sqrt(steps[0] / steps[1])):.2g}")
        reason += f"; over {steps[1]:,} steps a lower one goes as far"
    return Probe(tried, steps[0], len(counts), usual, first.rate, rate, reason)


def _beside(rate: float, found: Tensor | str, before: Tensor | str, counts: Tensor, seed: int) -> Tried:
    if isinstance(found, str):
        return Tried(rate=rate, loss=float("inf"), problem=found)
    loss = float(found.sum() / counts.sum())
    if isinstance(before, str) or found is before:
        return Tried(rate=rate, loss=loss)
    sums = resampled(torch.stack([found - before, counts], dim=1), seed)
    gap = interval(float((found - before).sum() / counts.sum()), sums[:, 0] / sums[:, 1])
    return Tried(rate=rate, loss=loss, gap=gap)
