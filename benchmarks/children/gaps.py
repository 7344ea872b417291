"""Child process: a run with default settings, and what lies between its steps."""

from __future__ import annotations

import time
from pathlib import Path

from parts.sides import Job, Result, be_child

from rankfold import Recipe, fine_tune
from rankfold.train.keeping.listener import Listener
from rankfold.train.step.loop import StepRecord


class Gaps(Listener):
    """When steps ended, how long they took, and which checkpoints were there by then."""

    def __init__(self, out: Path) -> None:
        self.checkpoints = out / "checkpoints"
        self.ends: list[float] = []
        self.seconds: list[float] = []
        self.present: list[set[str]] = []

    def on_step(self, record: StepRecord) -> None:
        self.ends.append(time.perf_counter())
        self.seconds.append(record.seconds)
        self.present.append({path.name for path in self.checkpoints.glob("step-*")})


def run(job: Job) -> Result:
    """``gaps`` between the end of each step and the beginning of the next; ``saved`` are the places of those
    in which a checkpoint appeared."""
    out = Path(job["folder"]) / "run"
    heard = Gaps(out)
    settings = {name: job[name] for name in ("model", "data", "max_minutes")}
    fine_tune(Recipe.of(settings | {"out": out, "samples": 0}), heard)
    places = range(len(heard.ends) - 1)
    return {
        "ends": heard.ends,
        "gaps": [heard.ends[n + 1] - heard.seconds[n + 1] - heard.ends[n] for n in places],
        "saved": [n for n in places if heard.present[n + 1] - heard.present[n]],
    }


if __name__ == "__main__":
    be_child(run)
