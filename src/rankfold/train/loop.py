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
from rankfold.errors import CheckpointError, TrainingError
from rankfold.train.checkpoints import Checkpoint
from rankfold.train.objectives import token_losses
from rankfold.train.random_states import random_states, set_random_states

MAX_GRADIENT_NORM = 1.0
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


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


class Trainer:
    """Model, optimiser and schedule of one run.

    ``rates`` gives the learning rate of a step; ``lora_B`` learns ``b_rate_factor`` times as fast
    (LoRA+, Hayou et al. 2024, arXiv 2402.12354, sec. 4)."""

    def __init__(
        self,
        model: Any,
        pad_id: int,
        rates: Callable[[int], float],
        steps: int,
        batching: Batching = Batching(),  # noqa: B008 - frozen
        b_rate_factor: float = 1.0,
    ) -> None:
        self.model = model
        self.batching = batching
        self.pad_id = pad_id
        self.rates = rates
        self.steps = steps
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for name, p in self.trained.items() if ".lora_B." not in name], "factor": 1.0},
                {
                    "params": [p for name, p in self.trained.items() if ".lora_B." in name],
                    "factor": b_rate_factor,
                },
            ],
            weight_decay=0.0,
            fused=True,
        )
        self.step_done = 0

    def run(
        self,
        steps: Iterable[list[EncodedRow]],
        on_step: Callable[[StepRecord], None],
        should_stop: Callable[[], object],
    ) -> None:
        """Train on the rows of each step, which go on after ``step_done``, or until ``should_stop``."""
        self.model.train()
        for rows in steps:
            if should_stop():
                break
            record = self.step(self.step_done + 1, self.batching.cut(rows))
            self.step_done = record.step
            on_step(record)
        self.model.eval()

    def step(self, step: int, micro_batches: list[MicroBatch]) -> StepRecord:
        """One optimiser step; every trained token in it weighs the same.

        Raises TrainingError, with weights and random state as they were, if the loss or a gradient is
        not finite."""
        started = time.perf_counter()
        random = random_states()
        trained_tokens = sum(row.trained_tokens for rows in micro_batches for row in rows)
        loss = sum(self.micro_batch(rows, trained_tokens) for rows in micro_batches)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRADIENT_NORM))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimiser.zero_grad()
            set_random_states(random)
            origins = ", ".join(row.origin for rows in micro_batches for row in rows)
            raise TrainingError(
                f"step {step} gave loss {loss} and gradient norm {norm}; stopped before the weights changed. "
                f"Rows of the step: {origins}. A lower learning rate is the usual remedy"
            )
        rate = self.rates(step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
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

    def checkpoint(self) -> Checkpoint:
        """The state after ``step_done`` steps; its tensors are the trainer's own."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimiser.state[parameter].items()
        }
        trained = {name: parameter.detach() for name, parameter in self.trained.items()}
        return Checkpoint(
            step=self.step_done, trained=trained, optimiser=moments, random=random_states(), state={}
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of a trainer of the same model; raises CheckpointError if it is not one."""
        keys = [f"{name}.{key}" for name in self.trained for key in ADAM_STATE]
        shapes = {name: p.shape for name, p in self.trained.items()}
        if {name: t.shape for name, t in checkpoint.trained.items()} != shapes:
            raise CheckpointError("the checkpoint holds other weights than this run trains")
        if set(checkpoint.optimiser) != set(keys):
            raise CheckpointError("the checkpoint does not hold this optimiser's state")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(checkpoint.trained[name])
                self.optimiser.state[parameter] = {
                    key: checkpoint.optimiser[f"{name}.{key}"].to(parameter.device) for key in ADAM_STATE
                }
        set_random_states(checkpoint.random)
        self.step_done = checkpoint.step

    def micro_batch(self, rows: MicroBatch, trained_tokens: int) -> float:
        """Forward and backward of one micro-batch; its share of the step's mean loss."""
        batch = self.batching.collate(rows, self.pad_id, self.model.device)
        loss: Tensor = token_losses(self.model, batch).sum() / trained_tokens
        loss.backward()
        return float(loss.detach())
