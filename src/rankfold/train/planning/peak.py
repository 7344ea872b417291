"""What a run has in memory when it has most, for each form of the base's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rankfold.kernels.cross_entropy import CHUNK_LOGITS
from rankfold.train.planning.activations import Kept
from rankfold.train.planning.footprint import (
    BEST_BYTES,
    GRADIENT_BYTES,
    MOMENT_BYTES,
    WEIGHT_BYTES,
    StorageForm,
    Weight,
    stored_bytes,
)

WIDE_TENSORS = 3  # of the widest layer's output, which a backward has at a time
LOGITS_BYTES = 3 * CHUNK_LOGITS * 4  # of a chunk: logits, shares, and what one is made into the other by
# A process has more than what is in use: memory freed among small things that stay is not used again, but
# where large blocks stay apart (models/base/heap.py).  Fitted to the measured runs of
# tests/train/planning/test_peak.py.
WASTE = 1.3
MARGIN = 1.15  # what a run takes is within this factor of what is said
PRODUCT_BYTES = 120_000_000  # in half precision on a CPU
HIDDEN_BYTES = 8  # of each feature of the last hidden states, and of their gradient


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What a frozen vision tower has in memory while it reads a micro-batch: ``numbers`` of its widest
    layer's input and output, and ``pixels``."""

    numbers: int
    pixels: int


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What a step has in memory beside the frozen weights: for ``trained`` numbers, and for each token by the
    ``hidden`` and ``widest`` features of the language model."""

    trained: int
    hidden: int
    widest: int

    def used(self, tokens: int, kept: float, dtype: torch.dtype, images: int = 0) -> float:
        """Bytes in use with a micro-batch of ``tokens``, whose forward keeps ``kept``; a frozen vision tower
        has ``images`` before the backward."""
        step = LOGITS_BYTES + tokens * self._a_token(dtype)
        return self._fixed + _of_products(dtype) + kept + max(step, images)

    def held(self, used: float, *, apart: bool) -> float:
        """Bytes that a process holds where ``used`` are in use at most, and large blocks are kept ``apart``
        or not."""
        return used if apart else WASTE * used

    def most_tokens(self, free: float, kept: float, dtype: torch.dtype, *, apart: bool) -> int:
        """Of a micro-batch that fits into ``free`` bytes with a margin, where a token keeps ``kept``."""
        room = free / MARGIN / self.held(1, apart=apart)
        room -= self._fixed + _of_products(dtype) + LOGITS_BYTES
        return max(0, int(room / (kept + self._a_token(dtype))))

    @property
    def _fixed(self) -> int:
        return self.trained * (WEIGHT_BYTES + GRADIENT_BYTES + MOMENT_BYTES + BEST_BYTES)

    def _a_token(self, dtype: torch.dtype) -> int:
        return WIDE_TENSORS * self.widest * dtype.itemsize + HIDDEN_BYTES * self.hidden


def _of_products(dtype: torch.dtype) -> int:
    """Bytes of the programs that oneDNN makes for products of one width."""
    return 0 if dtype == torch.float32 else PRODUCT_BYTES


def step_memory(model: Any) -> StepMemory:
    """Of a step of ``model``, a PeftModel."""
    trained, _ = model.get_nb_trainable_parameters()
    hidden = model.config.get_text_config().hidden_size
    decoder = model.get_base_model().get_decoder()
    wide = (getattr(module, "out_features", hidden) for module in decoder.modules())
    return StepMemory(trained=trained, hidden=hidden, widest=max(wide))


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A step of a run carried out before it, of so many ``rows`` and ``tokens``, with the ``largest``
    micro-batch (tokens) of an epoch: ``seconds`` of forward, backward and optimiser, ``judging_seconds``
    of a forward of held-out rows.  The process had ``peak_bytes`` at most, and ``left_bytes`` stayed free."""

    rows: int
    tokens: int
    largest: int
    seconds: float
    judging_seconds: float
    peak_bytes: int
    left_bytes: int

    @property
    def sentence(self) -> str:
        return (
            f"at the peak of its largest step, just carried out in {self.seconds:.1f} s ({self.tokens:,} "
            f"tokens, up to {self.largest:,} at once), and held-out rows judged in "
            f"{self.judging_seconds:.1f} s; {self.left_bytes / 1e9:.1f} GB stayed free"
        )


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The parts of a run's memory that are the same in every form.  ``tokens`` of a micro-batch, of which a
    forward keeps ``kept`` in each dtype."""

    weights: list[Weight]
    step: StepMemory
    tokens: int
    kept: dict[torch.dtype, Kept]
    tower: Tower
    program_bytes: int

    def of(self, form: StorageForm, dtype: torch.dtype, *, recomputed: bool) -> int:
        """Bytes of a run on weights in ``form`` that computes in ``dtype``."""
        weights = stored_bytes(self.weights, form, dtype.itemsize)
        kept = self.kept[dtype].recomputed if recomputed else self.kept[dtype].all
        used = self.step.used(self.tokens, kept, dtype, self._images(dtype))
        return self.program_bytes + weights + round(self.step.held(used, apart=recomputed))

    def _images(self, dtype: torch.dtype) -> int:
        return self.tower.numbers * dtype.itemsize + self.tower.pixels * 4
