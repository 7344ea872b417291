"""The best weights so far, judged on held-out rows while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Best:
    """The trained ``weights`` after ``step``, whose held-out row losses sum to the least, and how many
    ``evaluations_since`` brought nothing better.

    With a ``limit`` on the ``rise`` of the loss on general text, weights within it come before all others,
    and of those beyond it the ones that forgot least."""

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.step = 0
        self.rise = 0.0
        self.losses: Tensor | None = None
        self.weights: dict[str, Tensor] = {}
        self.evaluations_since = 0

    @property
    def is_within(self) -> bool:
        """Whether the best weights are within the limit."""
        return self.limit is None or self.rise <= self.limit

    def consider(self, step: int, losses: Tensor, weights: Mapping[str, Tensor], rise: float = 0.0) -> None:
        """Keep a copy of ``weights`` if they are the best yet: ``losses`` (held-out rows) are their row
        losses, ``rise`` is how much the loss on general text rose."""
        if self.losses is not None and self._place(losses, rise) >= self._place(self.losses, self.rise):
            self.evaluations_since += 1
            return
        self.step, self.losses, self.rise, self.evaluations_since = step, losses, rise, 0
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def _place(self, losses: Tensor, rise: float) -> tuple[bool, float]:
        """What is lower is better."""
        beyond = self.limit is not None and rise > self.limit
        return beyond, rise if beyond else float(losses.sum())

    def state(self) -> dict[str, Any]:
        """All but the weights, in JSON; floats come back to the bit."""
        losses = None if self.losses is None else self.losses.tolist()
        return {
            "step": self.step,
            "losses": losses,
            "rise": self.rise,
            "evaluations_since": self.evaluations_since,
        }

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        losses = state.get("losses")
        self.step = state.get("step", 0)
        self.losses = None if losses is None else torch.tensor(losses, dtype=torch.float64)
        self.rise = state.get("rise", 0.0)
        self.evaluations_since = state.get("evaluations_since", 0)
        self.weights = dict(weights)
