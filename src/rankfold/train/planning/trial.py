"""A micro-batch tried before the run: how much memory it takes, and how fast it goes."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rankfold.data.order.batches import MICRO_BATCH_TOKENS, MicroBatch
from rankfold.data.order.pack import Batching
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError
from rankfold.models.base.heap import keep_large_blocks_apart
from rankfold.models.base.precision import Precision
from rankfold.train.memory import free_memory_bytes
from rankfold.train.step.objectives import supervised

LONGEST_ROWS = 64  # enough to fill a micro-batch with short rows
PROBE_TOKENS = 256
MEMORY_SHARE = 0.6  # of the free memory; the rest is for the backward, the optimiser and other programs


@dataclass(frozen=True)
class Activations:
    """Whether what a layer computes is computed again in the backward instead of being kept, and why."""

    recomputed: bool
    reason: str


@dataclass(frozen=True)
class Trial:
    """Forward and backward of the adapted ``model`` on the longest of ``rows``.  Nothing remains of it but
    the warm memory: the gradients are dropped."""

    model: Any
    rows: Sequence[EncodedRow]
    pad_id: int
    precision: Precision

    def room(self, batching: Batching, recompute: bool | None = None) -> tuple[Batching, Activations]:
        """``batching`` with as many tokens as fit into the free memory, and whether activations are
        recomputed: only if those of one small micro-batch do not fit, or as given by ``recompute``."""
        per_token, free = self.kept_bytes_per_token(batching), free_memory_bytes(self.model.device)
        fits = int(MEMORY_SHARE * free / per_token)
        least = max(MICRO_BATCH_TOKENS, *map(len, self.rows))
        reason = f"keeping them takes {per_token * least / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        if recompute is None:
            recompute = fits < least and can_recompute(self.model)
        most = MICRO_BATCH_TOKENS if recompute else max(MICRO_BATCH_TOKENS, fits)
        return replace(batching, tokens=min(batching.tokens, most)), Activations(recompute, reason)

    def kept_bytes_per_token(self, batching: Batching) -> float:
        """What a forward keeps for the backward, beside parameters and buffers.  Counted, and not kept."""
        longest = max(self.rows, key=len)
        if not longest.images:
            ids = longest.input_ids[:PROBE_TOKENS]
            longest = EncodedRow(longest.origin, ids, ids)
        kept: dict[StorageWeakRef, int] = {}  # which lets a storage go, but not its place be given out again

        def count(tensor: Tensor) -> None:
            if _is_plain(tensor):
                storage = tensor.untyped_storage()
                kept[StorageWeakRef(storage)] = storage.nbytes()

        with saved_tensors_hooks(count, lambda nothing: nothing):  # nothing stays, so no backward can follow
            self._forward([longest], replace(batching, kind="padded"))
        for tensor in filter(_is_plain, chain(self.model.parameters(), self.model.buffers())):
            kept.pop(StorageWeakRef(tensor.untyped_storage()), None)
        return sum(kept.values()) / len(longest)

    def tokens_per_second(self, batching: Batching) -> float:
        """Of the longest micro-batch, the second time it runs."""
        rows = heapq.nlargest(LONGEST_ROWS, self.rows, key=len)
        longest = max(batching.cut(rows), key=lambda group: len(group[0]))
        self._run(longest, batching)
        started = time.perf_counter()
        self._run(longest, batching)
        return sum(map(len, longest)) / (time.perf_counter() - started)

    def _run(self, rows: MicroBatch, batching: Batching) -> None:
        losses = self._forward(rows, batching)
        losses.backward()
        self.model.zero_grad()
        losses.item()  # a GPU works on after the call

    def _forward(self, rows: MicroBatch, batching: Batching) -> Tensor:
        was_training = self.model.training
        self.model.train()
        with torch.random.fork_rng(), self.precision.autocast(self.model.device):
            losses, _ = supervised(self.model, batching.collate(rows, self.pad_id, self.model.device))
        self.model.train(was_training)
        return losses


def can_recompute(model: Any) -> bool:
    return bool(getattr(model.get_base_model(), "supports_gradient_checkpointing", False))


def recompute_activations(model: Any) -> None:
    """Let each decoder layer of ``model`` keep its input only, and compute the rest again in the backward
    (Chen et al. 2016, arXiv 1604.06174), and large tensors no pages that others could not use.  Raises
    ConfigError if the model cannot."""
    base = model.get_base_model()
    if not can_recompute(model):
        raise ConfigError(f"activation_checkpointing: {type(base).__name__} has no layers that can do it")
    # transformers before 5.23 knows the old name only.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    keep_large_blocks_apart(True)
    base.disable_input_require_grads()  # which only the reentrant kind needs, and a backward pays for


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
