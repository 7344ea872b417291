"""The training loop at three heights: run, step, micro-batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.data.order.batches import MicroBatch, share
from rankfold.data.order.batching import Batching, Padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import CheckpointError, TrainingError
from rankfold.models.base.heap import give_back_freed
from rankfold.models.base.memory import peak_memory_bytes
from rankfold.models.base.precision import Precision
from rankfold.processes import Processes
from rankfold.train.keeping.checkpoints import Checkpoint
from rankfold.train.step.average import Average, set_weights
from rankfold.train.step.loss_scale import LossScale
from rankfold.train.step.objectives import Objective, Supervised
from rankfold.train.step.pace import Pace

WHOLE = ".modules_to_save."  # in the names of what is trained whole
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step: mean loss in nats per trained token, gradient norm before clipping, and, where
    the step was followed by that, the mean loss on the held-out rows and the answers to sampled prompts;
    ``energy_joules`` are the processor's, where they can be read."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    trained_tokens: int
    tokens: int
    seconds: float
    memory_bytes: int = 0
    held_out_loss: float | None = None
    energy_joules: float | None = None
    answers: dict[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """What a tracker draws curves of."""
        values = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        del values["step"], values["steps"]
        return values | {"tokens_per_second": self.tokens / self.seconds}


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the rows of a step become new weights.

    ``rates`` gives the learning rate at a position (see ``Pace``); ``lora_B`` learns ``b_rate_factor`` times
    as fast (LoRA+, Hayou et al. 2024, arXiv 2402.12354, sec. 4), and modules that are trained whole
    ``whole_rate_factor`` times.  With ``ema_decay`` above 0 the weights that count are a running mean."""

    rates: Callable[[float], float]
    objective: Objective = Supervised()  # noqa: RUF009 - frozen
    batching: Batching = Padded()  # noqa: RUF009 - frozen
    precision: Precision = Precision.of("float32")  # noqa: RUF009 - frozen
    b_rate_factor: float = 1.0
    whole_rate_factor: float = 1.0
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0

    def rate_factor(self, name: str) -> float:
        """How much faster than ``rates`` says a parameter of this dotted name learns."""
        if WHOLE in name:
            return self.whole_rate_factor
        return self.b_rate_factor if ".lora_B." in name else 1.0


class Trainer:
    """Model and optimiser of one run, in one of its ``processes``."""

    def __init__(
        self, model: Any, pad_id: int, pace: Pace, method: Method, processes: Processes | None = None
    ) -> None:
        self.model = model
        self.pad_id = pad_id
        self.pace = pace
        self.method = method
        self.processes = processes or Processes()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.loss_scale = LossScale(method.precision.compute)
        self.average = Average(self.trained, method.ema_decay) if method.ema_decay else None
        self.optimiser = torch.optim.AdamW(
            [{"params": group, "factor": factor} for factor, group in self._by_rate().items()],
            weight_decay=method.weight_decay,
            fused=True,
        )
        self.step_done = 0

    def _by_rate(self) -> dict[float, list[nn.Parameter]]:
        """What is trained, by how much faster than the learning rate it learns."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            groups.setdefault(self.method.rate_factor(name), []).append(parameter)
        return groups

    def run(
        self,
        steps: Iterable[list[EncodedRow]],
        on_step: Callable[[StepRecord], None],
        should_stop: Callable[[], object],
    ) -> None:
        """Train on the rows of each step, which go on after ``step_done``, as long as the pace has some left,
        or until ``should_stop``."""
        self.model.train()
        with torch.random.fork_rng():  # each step sets the generator
            for rows in steps:
                left = -self.processes.highest(-self.pace.left(self.step_done))
                if should_stop() or left < 1:
                    break
                self.pace.begin_step(left)
                record = replace(self.step(self.step_done + 1, rows), steps=self.step_done + left)
                give_back_freed()
                self.pace.end_step()
                self.step_done = record.step
                on_step(record)
        self.model.eval()

    def step(self, step: int, rows: list[EncodedRow]) -> StepRecord:
        """One optimiser step on ``rows``; every trained token in them weighs the same.

        What is drawn in it, such as dropout, follows from seed, step and process alone, so nothing random
        is carried on.  Raises TrainingError, with weights as they were, if the loss or a gradient is not
        finite."""
        started = time.perf_counter()
        while True:
            torch.manual_seed(draw_seed(self.method.seed, step, self.processes.index))
            loss = self.mean_gradients(rows)
            norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.method.max_gradient_norm))
            if math.isfinite(loss) and math.isfinite(norm):
                break
            self.optimiser.zero_grad()
            if math.isfinite(loss) and self.loss_scale.lower():
                continue
            origins = ", ".join(row.origin for row in rows)
            raise TrainingError(
                f"step {step} gave loss {loss} and gradient norm {norm}; stopped before the weights changed. "
                f"Rows of the step: {origins}. A lower learning rate is the usual remedy"
            )
        rate = self.method.rates(self.pace.ahead)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.loss_scale.held()
        if self.average is not None:
            self.average.update(step)
        return StepRecord(
            step=step,
            steps=self.pace.steps,
            loss=loss,
            gradient_norm=norm,
            learning_rate=rate,
            trained_tokens=sum(row.trained_tokens for row in rows),
            tokens=sum(map(len, rows)),
            seconds=time.perf_counter() - started,
            memory_bytes=peak_memory_bytes(self.model.device),
        )

    def mean_gradients(self, rows: list[EncodedRow]) -> float:
        """Leave the gradients of the mean loss of all ``rows``, whichever process they are in; that loss."""
        loss_sum, weight = torch.zeros((), dtype=torch.float64, device=self.processes.device), 0.0
        for group, times in self._own_micro_batches(rows):
            group_sum, group_weight = self.micro_batch(group, times)
            loss_sum, weight = loss_sum + group_sum.to(loss_sum), weight + group_weight
        sums = self.processes.sum(torch.stack([loss_sum, loss_sum.new_tensor(weight)]))
        loss_sum, weight = sums[0], float(sums[1])
        self._sum_gradients()
        for parameter in self.trained.values():
            if parameter.grad is not None:
                parameter.grad.div_(weight * self.loss_scale.scale)
        return float(loss_sum / weight)

    def _own_micro_batches(self, rows: list[EncodedRow]) -> list[tuple[MicroBatch, int]]:
        """This process's share of ``rows``, each micro-batch with how often it counts.

        Those that share a base wait for each other in every layer, so they all do as many forwards: what
        one lacks is made up with a row that counts for nothing."""
        own = share(rows, self.processes.index, self.processes.count)
        groups = [(group, 1) for group in self.method.batching.cut(own)]
        missing = self.processes.highest(len(groups)) - len(groups)
        return groups + missing * [([rows[0]], 0)]

    def _sum_gradients(self) -> None:
        """Add up the gradients of all processes, in one exchange."""
        if self.processes.count == 1:
            return
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        total = self.processes.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def micro_batch(self, rows: MicroBatch, times: int = 1) -> tuple[Tensor, float]:
        """Forward and backward of one micro-batch, ``times`` over; the sum of its losses, and its weight."""
        batch = self.method.batching.collate(rows, self.pad_id, self.model.device)
        with self.method.precision.autocast(self.model.device):
            losses, weight = self.method.objective.sum(self.model, batch)
        (losses * (times * self.loss_scale.scale)).backward()
        return losses.detach().double() * times, weight * times

    def counting(self) -> AbstractContextManager[None]:
        """Within the block the model has the weights that count: the average, if the method asks for one."""
        return self.average.in_place() if self.average is not None else nullcontext()

    def take(self, weights: dict[str, Tensor]) -> None:
        """Go on with ``weights``, such as the best, as the ones that count."""
        set_weights(self.trained, weights)
        if self.average is not None:
            set_weights(self.average.weights, weights)

    def checkpoint(self) -> Checkpoint:
        """The state after ``step_done`` steps; its tensors are the trainer's own."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimiser.state[parameter].items()
        }
        trained = {name: parameter.detach() for name, parameter in self.trained.items()}
        averaged = self.average.weights if self.average is not None else {}
        return Checkpoint(
            step=self.step_done,
            trained=trained,
            optimiser=moments,
            averaged=averaged,
            state={"loss_scale": self.loss_scale.state(), "pace": self.pace.state()},
        )

    def restore(self, checkpoint: Checkpoint, reset_optimizer: bool = False) -> None:
        """Take over a checkpoint of a trainer of the same model, without its moments if ``reset_optimizer``.

        Raises CheckpointError if it is of another model or method."""
        keys = [f"{name}.{key}" for name in self.trained for key in ADAM_STATE]
        shapes = {name: p.shape for name, p in self.trained.items()}
        if {name: t.shape for name, t in checkpoint.trained.items()} != shapes:
            raise CheckpointError("the checkpoint holds other weights than this run trains")
        if set(checkpoint.averaged) != (set(shapes) if self.average else set()):
            raise CheckpointError("the checkpoint does not hold the average that this run keeps")
        if set(checkpoint.optimiser) != set(keys) and not reset_optimizer:
            raise CheckpointError("the checkpoint does not hold this optimiser's state")
        set_weights(self.trained, checkpoint.trained)
        if self.average is not None:
            set_weights(self.average.weights, checkpoint.averaged)
        for name, parameter in self.trained.items():
            self.optimiser.state[parameter] = (
                {}
                if reset_optimizer
                else {key: checkpoint.optimiser[f"{name}.{key}"].to(parameter.device) for key in ADAM_STATE}
            )
        self.loss_scale.restore(checkpoint.state.get("loss_scale", {}))
        self.pace.restore(checkpoint.state.get("pace", {}), checkpoint.step)
        self.step_done = checkpoint.step


def draw_seed(seed: int, step: int, process: int) -> int:
    """The seed of everything that is drawn in one step of one process."""
    return int.from_bytes(blake2b(f"{seed} {step} {process}".encode(), digest_size=7).digest())
