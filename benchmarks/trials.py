"""What the measuring scripts ask of a trial: the speed of a full micro-batch."""

from __future__ import annotations

import heapq
import time

from rankfold.data.order.batching import Batching
from rankfold.train.planning.trial import Trial

LONGEST_ROWS = 64  # enough to fill a micro-batch with short rows


def tokens_per_second(trial: Trial, batching: Batching) -> float:
    """Of the longest micro-batch, the second time it runs."""
    rows = heapq.nlargest(LONGEST_ROWS, trial.rows, key=len)
    longest = max(batching.cut(rows), key=lambda group: len(group[0]))
    trial.seconds(longest, batching)
    started = time.perf_counter()
    trial.seconds(longest, batching)
    return sum(map(len, longest)) / (time.perf_counter() - started)
