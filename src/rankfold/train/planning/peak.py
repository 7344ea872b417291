"""What a run has in memory when it has most, for each form of the base's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankfold.kernels.cross_entropy import CHUNK_LOGITS
from rankfold.train.planning.activations import Kept
from rankfold.train.planning.footprint import BEST_BYTES, AdapterSize, StorageForm, Weight, stored_bytes

WIDE_TENSORS = 3  # of the widest layer's output, which a backward has at a time
LOGIT_TENSORS = 3  # of a chunk: logits, shares, and what one is made into the other by
# A process has more than what is in use: memory freed among small things that stay is not used again, but
# where large blocks stay apart (models/base/heap.py).  Fitted to the measured runs of
# tests/train/planning/test_peak.py.
WASTE = 1.3
MARGIN = 1.15  # what a run takes is within this factor of what is said
HIDDEN_BYTES = 8  # of each feature of the last hidden states, and of their gradient


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What a frozen vision tower has in memory while it reads a micro-batch: ``numbers`` of its widest
    layer's input and output, and ``pixels``."""

    numbers: int
    pixels: int


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The parts of a run's memory that are the same in every form.  ``tokens`` of a micro-batch, ``hidden``
    and ``widest`` features of the language model, ``kept`` by a forward in each dtype."""

    weights: list[Weight]
    adapter: AdapterSize
    tokens: int
    hidden: int
    widest: int
    kept: dict[torch.dtype, Kept]
    tower: Tower
    program_bytes: int

    def of(self, form: StorageForm, dtype: torch.dtype, *, recomputed: bool) -> int:
        """Bytes of a run on weights in ``form`` that computes in ``dtype``."""
        weights = stored_bytes(self.weights, form, dtype.itemsize)
        kept = self.kept[dtype]
        used = self.adapter.training_bytes + self.adapter.trained * BEST_BYTES
        used += kept.recomputed if recomputed else kept.all
        used += max(self._backward(dtype), self._images(dtype))
        return self.program_bytes + weights + (used if recomputed else round(WASTE * used))

    def _backward(self, dtype: torch.dtype) -> int:
        wide = WIDE_TENSORS * self.tokens * self.widest * dtype.itemsize
        return wide + LOGIT_TENSORS * CHUNK_LOGITS * 4 + HIDDEN_BYTES * self.tokens * self.hidden

    def _images(self, dtype: torch.dtype) -> int:
        return self.tower.numbers * dtype.itemsize + self.tower.pixels * 4
