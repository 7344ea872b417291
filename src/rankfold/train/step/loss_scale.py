"""Keeping small gradients alive in float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

FIRST = 32.0  # of the sum over a step's tokens; of their mean, thousands
GROW_AFTER = 200  # steps
LEAST = 2.0**-10


class LossScale:
    """The number that a loss is multiplied by before the backward, and its gradients divided by after it
    (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).  1 for formats that need none.

    A step whose gradients overflow is done again at half the scale, never left out."""

    def __init__(self, compute: torch.dtype) -> None:
        self.adapts = compute == torch.float16
        self.scale = FIRST if self.adapts else 1.0
        self.steps_since = 0

    def lower(self) -> bool:
        """After an overflow: halve the scale; False if that cannot help."""
        if not self.adapts or self.scale <= LEAST:
            return False
        self.scale, self.steps_since = self.scale / 2, 0
        return True

    def held(self) -> None:
        """After a step without overflow; doubles the scale from time to time."""
        self.steps_since += 1
        if self.adapts and self.steps_since == GROW_AFTER:
            self.scale, self.steps_since = 2 * self.scale, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "steps_since": self.steps_since}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.scale = state.get("scale", self.scale)
        self.steps_since = state.get("steps_since", 0)
