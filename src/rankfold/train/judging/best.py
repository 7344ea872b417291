"""The best weights so far, judged on held-out rows while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Best:
    """The trained ``weights`` after ``step``, whose held-out row losses sum to the least, and how many
    ``evaluations_since`` brought nothing better."""

    def __init__(self) -> None:
        self.step = 0
        self.losses: Tensor | None = None
        self.weights: dict[str, Tensor] = {}
        self.evaluations_since = 0

    def consider(self, step: int, losses: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Keep a copy of ``weights`` if ``losses`` (held-out rows), their row losses, are the lowest yet."""
        if self.losses is not None and losses.sum() >= self.losses.sum():
            self.evaluations_since += 1
            return
        self.step, self.losses, self.evaluations_since = step, losses, 0
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def state(self) -> dict[str, Any]:
        """All but the weights, in JSON; floats come back to the bit."""
        losses = None if self.losses is None else self.losses.tolist()
        return {"step": self.step, "losses": losses, "evaluations_since": self.evaluations_since}

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        losses = state.get("losses")
        self.step = state.get("step", 0)
        self.losses = None if losses is None else torch.tensor(losses, dtype=torch.float64)
        self.evaluations_since = state.get("evaluations_since", 0)
        self.weights = dict(weights)
