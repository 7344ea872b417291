"""What a run minimises.  The loop knows nothing else of it, so that another objective is another object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rankfold.data.order.batch import Batch
from rankfold.judging.losses import token_losses


class Objective(Protocol):
    def sum(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The sum of the losses of what the batch holds (a scalar), and how much that counts in the mean."""


@dataclass(frozen=True)
class Supervised:
    """The cross-entropy in nats of the trained tokens.

    ``label_smoothing`` is the share of the target that is spread over the whole vocabulary (Szegedy et al.
    2016, arXiv 1512.00567, section 7)."""

    label_smoothing: float = 0.0

    def sum(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        losses = token_losses(model, batch, self.label_smoothing)
        return (losses * batch.targets.weights).sum(), batch.targets.weight
