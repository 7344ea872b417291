"""What a run's model has learnt and forgotten, beside its loss on the rows held out."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankfold.judging.changes import Moved
from rankfold.judging.forgotten import Forgetting
from rankfold.judging.held_out import Comparison

EXACT, ROUNDED = 0.001, 0.01  # nats a token: a change of the loss that is none, and that rounding may make
BY_HEART = 0.5  # of what was learnt on trained rows, the least share that holds on others
WORTH_TELLING = 0.02  # nats a token learnt on trained rows, below which no share is told
FEW_STEPS = 5
SLOW = 20  # times below the usual learning rate
TINY = 1e-7  # of a weight's norm: an update that changes no prediction


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt with the answers of base and tuned model."""

    prompt: str
    base: str
    tuned: str

    @property
    def differ(self) -> bool:
        return self.base != self.tuned


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """``moved``: the update beside the weights, by kind of layer; ``recall``: base and tuned on rows that
    were trained on; ``forgetting``: both on general text, None without any; ``answers``: to general prompts;
    ``nothing``: why nothing changed that can be told, empty if something did."""

    moved: list[Moved]
    recall: Comparison
    forgetting: Forgetting | None = None
    answers: list[Answered] = field(default_factory=list)
    nothing: str = ""

    def recalled(self, held_out: Comparison) -> str:
        """How much of what was learnt on trained rows holds on rows held out, in a sentence."""
        seen, unseen = -self.recall.gap, -held_out.gap
        numbers = (
            f"on {self.recall.rows:,} rows that it was trained on the loss is {self.recall.tuned_loss:.3f} "
            f"(base {self.recall.base_loss:.3f}), on held-out rows {held_out.tuned_loss:.3f} "
            f"(base {held_out.base_loss:.3f})"
        )
        if seen < WORTH_TELLING:
            return numbers
        share = max(0.0, unseen / seen)
        told = f"{numbers}: {share:.0%} of what it learnt holds on rows that it has not seen"
        by_heart = "; the rest it knows by heart: fewer passes or more rows help"
        return told if share >= BY_HEART else told + by_heart


def no_change(comparison: Comparison, forgetting: Forgetting | None) -> bool:
    """Whether base and tuned say the same of the rows held out and of general text, but for what half
    precision rounds."""
    gap = abs(comparison.gap)
    same = gap < EXACT or (gap < ROUNDED and comparison.gap_low <= 0 <= comparison.gap_high)
    return same and (forgetting is None or forgetting.whole.divergence.value < ROUNDED)


def cause(moved: list[Moved], learning_rate: float, usual: float, steps: int) -> str:
    """The likeliest cause of a run that changed nothing."""
    most = max((each.most for each in moved), default=0.0)
    if most == 0:
        return "the update is zero in every layer: no gradient reached the adapter"
    if learning_rate < usual / SLOW:
        times = usual / learning_rate
        return f"the learning rate {learning_rate:g} is {times:,.0f} times below the usual {usual:g}"
    if steps < FEW_STEPS:
        return f"{steps} steps are too few"
    if most < TINY:
        return f"no layer moved by more than {most:.1e} of its weight"
    return "the layers that moved have no effect on what the model says; look at targets"
