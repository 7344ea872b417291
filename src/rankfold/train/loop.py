"""The training loop at three heights: run, step, micro-batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.data.batches import MicroBatch
from rankfold.data.encode import EncodedRow
from rankfold.data.pack import Batching
from rankfold.errors import TrainingError
from rankfold.train.objectives import token_losses

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step: mean loss in nats per trained token, gradient norm before clipping."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    trained_tokens: int
    tokens: int
    seconds: float


def learning_rate_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """The rate of step ``step`` (1-based): linear warm-up to ``peak``, then half a cosine down to 0,
    which the step after the last would have.  Loshchilov & Hutter 2017 (arXiv 1608.03983), eq. 5."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """Model, optimiser and schedule of one run."""

    def __init__(
        self,
        model: Any,
        pad_id: int,
        schedule: Callable[[int], float],
        steps: int,
        batching: Batching = Batching(),  # noqa: B008 - frozen
    ) -> None:
        self.model = model
        self.batching = batching
        self.pad_id = pad_id
        self.schedule = schedule
        self.steps = steps
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, weight_decay=0.0, fused=True)

    def run(
        self,
        batches: Iterable[list[EncodedRow]],
        on_step: Callable[[StepRecord], None],
        should_stop: Callable[[], bool],
    ) -> int:
        """Train on the rows of each step, or until ``should_stop``; the number of steps done."""
        self.model.train()
        done = 0
        for step, rows in enumerate(batches, start=1):
            on_step(self.step(step, self.batching.cut(rows)))
            done = step
            if should_stop():
                break
        self.model.eval()
        return done

    def step(self, step: int, micro_batches: list[MicroBatch]) -> StepRecord:
        """One optimiser step; every trained token in it weighs the same.

        Raises TrainingError, with the weights as they were, if the loss or a gradient is not finite."""
        started = time.perf_counter()
        trained_tokens = sum(row.trained_tokens for rows in micro_batches for row in rows)
        loss = sum(self.micro_batch(rows, trained_tokens) for rows in micro_batches)
        norm = float(nn.utils.clip_grad_norm_(self.trained, MAX_GRADIENT_NORM))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimiser.zero_grad()
            origins = ", ".join(row.origin for rows in micro_batches for row in rows)
            raise TrainingError(
                f"step {step} gave loss {loss} and gradient norm {norm}; stopped before the weights changed. "
                f"Rows of the step: {origins}. A lower learning rate is the usual remedy"
            )
        rate = self.schedule(step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        return StepRecord(
            step=step,
            steps=self.steps,
            loss=loss,
            gradient_norm=norm,
            learning_rate=rate,
            trained_tokens=trained_tokens,
            tokens=sum(len(row) for rows in micro_batches for row in rows),
            seconds=time.perf_counter() - started,
        )

    def micro_batch(self, rows: MicroBatch, trained_tokens: int) -> float:
        """Forward and backward of one micro-batch; its share of the step's mean loss."""
        batch = self.batching.collate(rows, self.pad_id, self.model.device)
        loss: Tensor = token_losses(self.model, batch).sum() / trained_tokens
        loss.backward()
        return float(loss.detach())
