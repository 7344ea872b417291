"""Judging a run's model on the held-out rows, while it is trained and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from rankfold.data.shapes.example import Example
from rankfold.data.tokens.encode import EncodedRow
from rankfold.judging.changes import Moved, moved
from rankfold.judging.forgotten import Forgetting, Reading
from rankfold.judging.held_out import Comparison, compare
from rankfold.judging.learnt import Answered, Learnt, cause, no_change
from rankfold.judging.losses import row_losses
from rankfold.judging.rows import question_in_words, spread
from rankfold.models.answering.answers import replies
from rankfold.models.answering.sampling import Sampling
from rankfold.train.asked.advise import settle
from rankfold.train.judging.best import Best
from rankfold.train.keeping.listener import Sample
from rankfold.train.planning.plan import ANSWER_TOKENS, GENERAL_ANSWER_TOKENS, MOST_RECALLED, Plan
from rankfold.train.step.loop import Trainer

SAMPLING = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0.0)
GENERAL_SAMPLING = Sampling(max_new_tokens=GENERAL_ANSWER_TOKENS, temperature=0.0)
GENERAL_ANSWERS_A_MINUTE = 2  # general questions that are answered for each minute that the run takes


@dataclass(frozen=True, eq=False)
class Look:
    """What one model makes of trained rows, their losses (rows), and its answers to sampled and to general
    prompts."""

    recall: Tensor
    answers: dict[str, str]
    general: dict[str, str]


class Judge:
    """Knows the best weights so far.  Nothing it does is felt by the training: steps draw from seeds of
    their own."""

    def __init__(self, plan: Plan, trainer: Trainer) -> None:
        self.plan, self.trainer = plan, trainer
        self.best = Best(plan.recipe.forget_limit)
        self.trained_tokens = sum(row.trained_tokens for row in plan.held_out)

    def evaluate(self, step: int) -> float:
        """The mean held-out loss after ``step``, in nats per trained token; the best weights are kept."""
        with self.trainer.counting():
            losses = self._row_losses(self.plan.held_out)
            self.best.consider(step, losses, self.trainer.trained, self._rise())
        return float(losses.sum()) / self.trained_tokens

    def _rise(self) -> float:
        """By how much the loss on general text rose, if the run has a limit for it."""
        if self.plan.recipe.forget_limit is None:
            return 0.0
        forgetting = self._forgetting()
        assert forgetting is not None
        return forgetting.whole.rise.value

    @property
    def had_enough(self) -> bool:
        """Whether so many evaluations brought nothing better that the run is to end."""
        patience = self.plan.recipe.patience
        return patience is not None and self.best.evaluations_since >= patience

    def answers(self) -> dict[str, str]:
        """The greedy answer to each of the sampled prompts."""
        with self.trainer.counting():
            return self._answers(self.sampled(), SAMPLING)

    def _answers(self, examples: Sequence[Example], sampling: Sampling) -> dict[str, str]:
        """What the model as it is answers."""
        if not examples:
            return {}
        with self.plan.precision.autocast(self.plan.model.device):
            found = replies(self.plan.base, [example.prompt for example in examples], sampling)
        return {question_in_words(example): answer for example, answer in zip(examples, found, strict=True)}

    def sampled(self) -> list[Example]:
        """``recipe.samples`` held-out rows, spread evenly over the file."""
        return spread(self.plan.rows.held_out, self.plan.recipe.samples)

    def settle(self) -> str:
        """Judge the weights as they are too, and go back to the best if others were better; says so."""
        last = self.trainer.step_done
        if self.best.step != last:
            self.evaluate(last)
        told = ""
        if self.best.step != last:
            self.trainer.take(self.best.weights)
            within = "" if self.best.limit is None else " of those within forget_limit"
            told = (
                f"the weights after step {self.best.step} did best on the held-out rows{within}, and are "
                f"kept instead of the last (step {last}); chosen on these rows, they look a little better on "
                "them than they are"
            )
        if self.best.is_within:
            return told
        return (
            f"at no look had the loss on general text risen by {self.best.limit:g} or less; kept are the "
            f"weights after step {self.best.step}, which forgot least ({self.best.rise:.2f}). A lower "
            "learning_rate and more looks (evaluate_every_steps) help"
        )

    def compare(self) -> tuple[Comparison, list[Sample], Learnt]:
        """The settled model against its base, which is the same model without its adapter: on the rows held
        out, in answers, and in what it learnt and forgot."""
        plan, seed = self.plan, self.plan.recipe.seed
        with plan.model.disable_adapter():
            base, base_losses = self._look(), self._row_losses(plan.held_out)
        with self.trainer.counting():
            tuned, forgetting, layers = self._look(), self._forgetting(), self._moved()
        losses = self.best.losses
        assert losses is not None
        comparison = compare(plan.held_out, base_losses, losses, seed)
        learnt = Learnt(
            moved=layers,
            recall=compare(self._recalled(), base.recall, tuned.recall, seed),
            forgetting=forgetting,
            answers=[
                Answered(prompt=prompt, base=before, tuned=tuned.general[prompt])
                for prompt, before in base.general.items()
            ],
            nothing=self._why(layers) if no_change(comparison, forgetting) else "",
        )
        written = {question_in_words(example): example.answer for example in self.sampled()}
        samples = [
            Sample(prompt=prompt, written=written[prompt], base=before, tuned=tuned.answers[prompt])
            for prompt, before in base.answers.items()
        ]
        return comparison, samples, learnt

    def _look(self) -> Look:
        """What the model as it is makes of rows that were trained on, and its answers; general questions as
        many as a run of this length has time for."""
        questions = [] if self.plan.general is None else self.plan.general.questions
        count = int(GENERAL_ANSWERS_A_MINUTE * self.plan.expected_minutes)
        return Look(
            recall=self._row_losses(self._recalled()),
            answers=self._answers(self.sampled(), SAMPLING),
            general=self._answers(questions[:count], GENERAL_SAMPLING),
        )

    def _recalled(self) -> list[EncodedRow]:
        """Rows that were trained on, to be looked at again."""
        return spread(self.plan.train, min(MOST_RECALLED, len(self.plan.held_out)))

    def _moved(self) -> list[Moved]:
        return [] if self.plan.recipe.shard_base else moved(self.plan.model)

    def _why(self, layers: list[Moved]) -> str:
        """The likely cause of a run that changed nothing."""
        plan = self.plan
        recipe = plan.recipe.model_copy(update={"learning_rate": None})
        usual = settle(recipe, len(plan.train), plan.parameters)
        return cause(layers, plan.settings.learning_rate, usual.learning_rate, plan.settings.steps)

    def _forgetting(self) -> Forgetting | None:
        """What the model has forgotten as it is now; None without general text."""
        general = self.plan.general
        if general is None:
            return None
        return general.forgotten(self.plan.model, self._base_reading, self.plan.recipe.seed)

    @cached_property
    def _base_reading(self) -> Reading:
        assert self.plan.general is not None
        with self.plan.model.disable_adapter():
            return self.plan.general.read_by(self.plan.model)

    def state(self) -> dict[str, Any]:
        return {"best": self.best.state()}

    def restore(self, state: dict[str, Any], best: Any) -> None:
        self.best.restore(state.get("best", {}), best)

    def _row_losses(self, rows: Sequence[EncodedRow]) -> Tensor:
        plan = self.plan
        with plan.precision.autocast(plan.model.device):
            return row_losses(plan.model, rows, plan.pad_id, plan.processes, plan.reader)
