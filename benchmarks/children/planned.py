"""A run forecast from its config, planned, and carried out: the memory and time that were said, and used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from parts.sides import Job, Result, be_child, peak_bytes

from rankfold import Recipe, fine_tune
from rankfold.train.keeping.listener import Listener
from rankfold.train.planning.forecast import ForecastRequest, forecast
from rankfold.train.planning.plan import Plan


class Watch(Listener):
    """Notes what the plan says, and when the steps begin."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.began = 0.0

    def on_plan(self, plan: Plan) -> None:
        self.plan = plan

    def on_stage(self, stage: str) -> None:
        if stage == "training":
            self.began = time.perf_counter()


def work(job: Job) -> Result:
    return _forecast(job["recipe"]) if job["only"] == "forecast" else _run(job["recipe"], job["folder"])


def _forecast(recipe: dict[str, Any]) -> Result:
    told = forecast(ForecastRequest.of(recipe))
    form = next(form for form in told.forms if form.name == (recipe.get("stored") or recipe["precision"]))
    recomputed = bool(recipe.get("activation_checkpointing")) or form.fits == "recomputed"
    return {
        "bytes": form.recomputed_peak_bytes if recomputed else form.peak_bytes,
        "seconds": form.seconds,
    }


def _run(recipe: dict[str, Any], folder: str) -> Result:
    watch = Watch()
    fine_tune(Recipe.of(recipe | {"out": Path(folder) / "run"}), watch)
    seconds = time.perf_counter() - watch.began
    assert watch.plan is not None
    assert watch.plan.preflight is not None
    return {
        "said_bytes": watch.plan.preflight.peak_bytes,
        "said_seconds": 60 * watch.plan.expected_minutes,
        "bytes": peak_bytes(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    be_child(work)
