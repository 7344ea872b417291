"""How far a run has come: by its steps, or, where it has a time to fit into, by the steps that still do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Any

RECENT_STEPS = 8  # whose mean time the next ones are taken to need


class Pace:
    """``position`` is how much of the plan's ``steps`` is done, ``ahead`` how much will be after the step
    that has begun; the learning rate follows that.

    Without a time it is the number of the last step.  In a run of ``seconds`` each step goes on by an equal
    share of what is left, as many as still fit and ``most`` at most: so the last step that fits has the last
    rate of the schedule, and where the machine gets slower the fall begins earlier.  ``per_step`` are the
    seconds that a step takes as far as is known before the first one."""

    def __init__(
        self,
        steps: int,
        seconds: float | None = None,
        per_step: float = 0.0,
        most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.seconds, self.most = steps, seconds, most or steps
        self.position = self.ahead = 0.0
        self.used = 0.0
        self._per_step = per_step
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._clock = clock
        self._last: float | None = None

    def left(self, step_done: int) -> int:
        """How many steps are still to come after ``step_done``; at least one in every run."""
        rest = self.most - step_done
        if self.seconds is None:
            return rest
        self._pass_time()
        per_step = fmean(self._recent) if self._recent else self._per_step
        fitting = int((self.seconds - self.used) / per_step) if per_step else rest
        return min(rest, max(fitting, int(step_done == 0)))

    def begin_step(self, left: int) -> None:
        """The next of ``left`` steps begins."""
        self._pass_time()
        share = 1.0 if self.seconds is None else (self.steps - self.position) / left
        self.ahead = self.position + share

    def end_step(self) -> None:
        self._recent.append(self._pass_time())
        self.position = self.ahead

    @property
    def remaining(self) -> float:
        """Seconds, from now on; infinite without a time."""
        self._pass_time()
        return float("inf") if self.seconds is None else self.seconds - self.used

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "used": self.used, "recent": [*self._recent]}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on from ``state``, that of a run after ``step``; a checkpoint may be older than this."""
        self.position = float(state.get("position", step))
        self.used = float(state.get("used", 0.0))
        self._recent.extend(state.get("recent", ()))

    def _pass_time(self) -> float:
        """Count the time since this was called last; it, in seconds."""
        now = self._clock()
        passed = 0.0 if self._last is None else now - self._last
        self._last = now
        self.used += passed
        return passed
