"""Judging a run's model on the held-out rows, while it is trained and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.data.shapes.example import Example
from rankfold.judging.held_out import Comparison, compare
from rankfold.judging.losses import row_losses
from rankfold.models.answering.answers import replies
from rankfold.models.answering.sampling import Sampling
from rankfold.train.judging.best import Best
from rankfold.train.keeping.listener import Sample
from rankfold.train.planning.plan import Plan
from rankfold.train.step.loop import Trainer

SAMPLING = Sampling(max_new_tokens=64, temperature=0.0)


def asked(example: Example) -> str:
    """The last turn of the prompt in words, with the names of its images."""
    content = example.prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(
        part["text"] if part["type"] == "text" else f"<{Path(part['path']).name}>" for part in content
    )


class Judge:
    """Knows the best weights so far.  Nothing it does is felt by the training: steps draw from seeds of
    their own."""

    def __init__(self, plan: Plan, trainer: Trainer) -> None:
        self.plan, self.trainer = plan, trainer
        self.best = Best()
        self.trained_tokens = sum(row.trained_tokens for row in plan.held_out)

    def evaluate(self, step: int) -> float:
        """The mean held-out loss after ``step``, in nats per trained token; the best weights are kept."""
        with self.trainer.counting():
            losses = self._row_losses()
            self.best.consider(step, losses, self.trainer.trained)
        return float(losses.sum()) / self.trained_tokens

    @property
    def had_enough(self) -> bool:
        """Whether so many evaluations brought nothing better that the run is to end."""
        patience = self.plan.recipe.patience
        return patience is not None and self.best.evaluations_since >= patience

    def answers(self) -> dict[str, str]:
        """The greedy answer to each of the sampled prompts."""
        with self.trainer.counting(), self.plan.precision.autocast(self.plan.model.device):
            sampled = self.sampled()
            answers = replies(self.plan.base, [example.prompt for example in sampled], SAMPLING)
            return {asked(example): answer for example, answer in zip(sampled, answers, strict=True)}

    def sampled(self) -> list[Example]:
        """``recipe.samples`` held-out rows, spread evenly over the file."""
        rows = self.plan.rows.held_out
        count = min(self.plan.recipe.samples, len(rows))
        return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]

    def settle(self) -> str:
        """Judge the weights as they are too, and go back to the best if others were better; says so."""
        last = self.trainer.step_done
        if self.best.step != last:
            self.evaluate(last)
        if self.best.step == last:
            return ""
        self.trainer.take(self.best.weights)
        return (
            f"the weights after step {self.best.step} did best on the held-out rows, and are kept instead of "
            f"the last (step {last}); chosen on these rows, they look a little better on them than they are"
        )

    def compare(self) -> tuple[Comparison, list[Sample]]:
        """The settled model against its base, which is the same model without its adapter."""
        model, answers = self.plan.model, self.answers()
        with model.disable_adapter():
            base_losses, base_answers = self._row_losses(), self.answers()
        assert self.best.losses is not None
        comparison = compare(self.plan.held_out, base_losses, self.best.losses, self.plan.recipe.seed)
        written = {asked(example): example.answer for example in self.sampled()}
        return comparison, [
            Sample(prompt=prompt, written=written[prompt], base=base_answers[prompt], tuned=tuned)
            for prompt, tuned in answers.items()
        ]

    def state(self) -> dict[str, Any]:
        return {"best": self.best.state()}

    def restore(self, state: dict[str, Any], best: Any) -> None:
        self.best.restore(state.get("best", {}), best)

    def _row_losses(self) -> Tensor:
        plan = self.plan
        with plan.precision.autocast(plan.model.device):
            return row_losses(plan.model, plan.held_out, plan.pad_id, plan.processes, plan.reader)
