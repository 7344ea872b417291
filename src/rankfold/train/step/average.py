"""The running mean of the trained weights over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UP = 10  # a step's mean looks back over a tenth of the steps so far, until that is more than it may


class Average:
    """An exponential moving average of ``trained`` with ``decay``, whose reach grows with the steps, so that
    the start counts for little (Polyak & Juditsky 1992; the warm-up is TensorFlow's ``num_updates``)."""

    def __init__(self, trained: Mapping[str, Tensor], decay: float) -> None:
        self.trained = trained
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after ``step``."""
        decay = min(self.decay, (1 + step) / (WARM_UP + step))
        for name, tensor in self.trained.items():
            self.weights[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model computes with the average."""
        kept = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
        set_weights(self.trained, self.weights)
        try:
            yield
        finally:
            set_weights(self.trained, kept)


@torch.no_grad()
def set_weights(trained: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, tensor in trained.items():
        tensor.copy_(weights[name])
