"""What a run tells while it goes on, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rankfold.judging.held_out import Comparison
from rankfold.judging.learnt import Learnt
from rankfold.train.planning.plan import Plan
from rankfold.train.step.loop import StepRecord


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out prompt with the row's own answer and both models' greedy answers."""

    prompt: str
    written: str
    base: str
    tuned: str


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left in ``out``; one that was stopped early has none of the last three."""

    out: Path
    steps: list[StepRecord]
    stopped_by: int = 0  # the number of the signal that ended it early, or ``stopping.CALLER``
    comparison: Comparison | None = None
    learnt: Learnt | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        return bool(self.stopped_by)


class Listener:
    """Told what happens during a run; every call does nothing unless overridden."""

    def on_stage(self, stage: str) -> None:
        """A part of the run begins."""

    def on_note(self, note: str) -> None:
        """Something that the user should know, in one sentence."""

    def on_plan(self, plan: Plan) -> None:
        """Everything is decided; nothing has been trained."""

    def on_step(self, record: StepRecord) -> None:
        """An optimiser step is done."""

    def on_stopping(self) -> None:
        """SIGINT (Ctrl-C) or SIGTERM came; the run stops after this step."""

    def wants_stop(self) -> bool:
        """Asked after every step, in whichever thread the run is: whether it is to stop as after SIGINT."""
        return False

    def on_result(self, result: RunResult) -> None:
        """The output folder is complete."""
