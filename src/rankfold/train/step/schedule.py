"""The learning rate at each step: a linear warm-up, then one of a few falls."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "linear", "constant", "wsd"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
WSD_DECAY_SHARE = 0.2  # of the steps after the warm-up


def learning_rate_at(
    step: float, steps: int, warmup_steps: int, peak: float, schedule: Schedule = "cosine"
) -> float:
    """The rate of step ``step`` (1-based; it may lie between two) of ``steps``.  After the warm-up:

    * cosine: half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)
    * linear: a straight line
    * constant: the peak
    * wsd: the peak, and a straight line over the last fifth (Hu et al. 2024, arXiv 2404.06395, sec. 4)

    All but constant fall towards 0, which the step after the last would have."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    left = (steps - step + 1) / (steps - warmup_steps + 1)  # 1 at the end of the warm-up, 0 after the last
    return (
        peak
        * {
            "cosine": 0.5 * (1 - math.cos(math.pi * left)),
            "linear": left,
            "constant": 1.0,
            "wsd": min(1.0, left / WSD_DECAY_SHARE),
        }[schedule]
    )
