"""What a run tells while it goes on, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rankfold.train.evaluate import Comparison
from rankfold.train.loop import StepRecord
from rankfold.train.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out prompt with the row's own answer and both models' greedy answers."""

    prompt: str
    written: str
    base: str
    tuned: str


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left in ``out``; one that was interrupted has no comparison and no samples."""

    out: Path
    steps: list[StepRecord]
    interrupted: bool
    comparison: Comparison | None = None
    samples: list[Sample] = field(default_factory=list)


class Listener:
    """Told what happens during a run; every call does nothing unless overridden."""

    def on_stage(self, stage: str) -> None:
        """A part of the run begins."""

    def on_plan(self, plan: Plan) -> None:
        """Everything is decided; nothing has been trained."""

    def on_step(self, record: StepRecord) -> None:
        """An optimiser step is done."""

    def on_stopping(self) -> None:
        """Ctrl-C was pressed; the run stops after this step."""

    def on_result(self, result: RunResult) -> None:
        """The output folder is complete."""
