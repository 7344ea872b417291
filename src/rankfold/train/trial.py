"""A micro-batch tried before the run: how large it may be, and how fast it goes."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rankfold.data.batches import MICRO_BATCH_TOKENS, MicroBatch
from rankfold.data.encode import EncodedRow
from rankfold.data.pack import Batching
from rankfold.models.precision import Precision
from rankfold.train.objectives import supervised

LONGEST_ROWS = 64  # enough to fill a micro-batch with short rows
MEMORY_SHARE = 0.6  # of a GPU's free memory; the rest is for the optimiser, and for what grows faster


@dataclass(frozen=True)
class Trial:
    """Forward and backward of the adapted ``model`` on the longest of ``rows``.  Nothing remains of it but
    the warm memory: the gradients are dropped."""

    model: Any
    rows: Sequence[EncodedRow]
    pad_id: int
    precision: Precision

    def fit(self, batching: Batching) -> Batching:
        """``batching`` with as many tokens as fit into the memory of the GPU, going by what a small
        micro-batch takes; as it is on a CPU."""
        device = self.model.device
        if device.type != "cuda":
            return batching
        small = self._longest(replace(batching, tokens=MICRO_BATCH_TOKENS))
        self._run(small, batching)  # so that what the libraries keep for themselves is there
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._run(small, batching)
        taken = torch.cuda.max_memory_allocated(device) - before
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        fits = int(MEMORY_SHARE * free / taken * sum(map(len, small)))
        return replace(batching, tokens=max(MICRO_BATCH_TOKENS, min(fits, batching.tokens)))

    def tokens_per_second(self, batching: Batching) -> float:
        """Of the longest micro-batch, the second time it runs."""
        longest = self._longest(batching)
        self._run(longest, batching)
        started = time.perf_counter()
        self._run(longest, batching)
        return sum(map(len, longest)) / (time.perf_counter() - started)

    def _longest(self, batching: Batching) -> MicroBatch:
        longest = heapq.nlargest(LONGEST_ROWS, self.rows, key=len)
        return max(batching.cut(longest), key=lambda group: len(group[0]))

    def _run(self, rows: MicroBatch, batching: Batching) -> None:
        with torch.random.fork_rng():
            with self.precision.autocast(self.model.device):
                losses, _ = supervised(self.model, batching.collate(rows, self.pad_id, self.model.device))
            losses.backward()
            self.model.zero_grad()
            losses.item()  # a GPU works on after the call
