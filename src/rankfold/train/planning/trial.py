"""A micro-batch tried before the run: how much memory it takes, and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rankfold.data.order.batches import MICRO_BATCH_TOKENS, MicroBatch
from rankfold.data.order.batching import Batching, Padded, PaddedImages
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError
from rankfold.models.base.heap import keep_large_blocks_apart
from rankfold.models.base.memory import free_memory_bytes
from rankfold.models.base.precision import Precision
from rankfold.train.step.objectives import Supervised

SMALL, LARGE = 1 / 8, 3 / 8  # of a full micro-batch: enough to tell what a call and what a token takes
PROBE_TOKENS = 256
MEMORY_SHARE = 0.6  # of the free memory; the rest is for the backward, the optimiser and other programs


@dataclass(frozen=True)
class Activations:
    """Whether what a layer computes is computed again in the backward instead of being kept, and why."""

    recomputed: bool
    reason: str


@dataclass(frozen=True)
class Cost:
    """Seconds that a micro-batch takes, forward and backward: some for the call and some for each token, the
    padding too; ``forward`` is the share of the forward in them.  ``loss`` is that of the rows that were
    tried, in nats a trained token."""

    per_call: float
    per_token: float
    forward: float
    loss: float = 0.0

    def seconds(self, groups: Iterable[MicroBatch], batching: Batching) -> float:
        return sum(self.per_call + self.per_token * batching.size(group) for group in groups)


def _up_to(rows: Sequence[EncodedRow], tokens: float) -> MicroBatch:
    """So many of ``rows`` that they have about as many tokens; at least one."""
    taken = [rows[0]]
    for row in rows[1:]:
        if sum(map(len, taken)) + len(row) > tokens:
            break
        taken.append(row)
    return taken


@dataclass(frozen=True)
class Trial:
    """Forward and backward of the adapted ``model`` on some of ``rows``.  Nothing remains of it but the warm
    memory: the gradients are dropped."""

    model: Any
    rows: Sequence[EncodedRow]
    pad_id: int
    precision: Precision

    def room(
        self, batching: Batching, recompute: bool | None = None, *, fixed: bool = False
    ) -> tuple[Batching, Activations]:
        """``batching`` with as many tokens as fit into the free memory, or as it is if ``fixed``, and whether
        activations are recomputed: only if those of one small micro-batch do not fit, or as given by
        ``recompute``."""
        per_token, free = self.kept_bytes_per_token(batching), free_memory_bytes(self.model.device)
        fits = int(MEMORY_SHARE * free / per_token)
        least = max(MICRO_BATCH_TOKENS, *map(len, self.rows))
        reason = f"keeping them takes {per_token * least / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        if recompute is None:
            recompute = fits < least and can_recompute(self.model)
        if fixed:
            return batching, Activations(recompute, reason)
        most = MICRO_BATCH_TOKENS if recompute else max(MICRO_BATCH_TOKENS, fits)
        fitting: Any = replace(cast(Any, batching), tokens=min(batching.tokens, most))
        return fitting, Activations(recompute, reason)

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
            self._forward([longest], batching if longest.images else Padded())
        for tensor in filter(_is_plain, chain(self.model.parameters(), self.model.buffers())):
            kept.pop(StorageWeakRef(tensor.untyped_storage()), None)
        return sum(kept.values()) / len(longest)

    def cost(self, batching: Batching) -> Cost:
        """What a micro-batch takes, measured on a small one and a larger one of rows of usual length, warm
        from the forward for ``room``; on one of images, whose tokens do not tell what they take, alone."""
        middle = sorted(self.rows, key=len)[len(self.rows) // 4 :]
        small, large = (_up_to(middle, share * batching.tokens) for share in (SMALL, LARGE))
        if isinstance(batching, PaddedImages):
            small = large
        forward, seconds, loss = self.seconds(small, batching)
        if len(large) == len(small):
            return Cost(0.0, seconds / batching.size(large), forward / seconds, loss)
        forward, more, loss = self.seconds(large, batching)
        per_token = max(more - seconds, 0.0) / (batching.size(large) - batching.size(small))
        per_token = min(per_token, more / batching.size(large))
        return Cost(more - per_token * batching.size(large), per_token, forward / more, loss)

    def seconds(self, rows: MicroBatch, batching: Batching) -> tuple[float, float, float]:
        """Seconds of the forward, and of forward and backward; and the loss in nats a trained token."""
        started = time.perf_counter()
        losses, weight = self._forward(rows, batching)
        loss = losses.item() / weight  # a GPU works on after the call
        forward = time.perf_counter() - started
        losses.backward()
        self.model.zero_grad()
        if losses.is_cuda:
            torch.cuda.synchronize()
        return forward, time.perf_counter() - started, loss

    def _forward(self, rows: MicroBatch, batching: Batching) -> tuple[Tensor, float]:
        was_training = self.model.training
        self.model.train()
        with torch.random.fork_rng(), self.precision.autocast(self.model.device):
            batch = batching.collate(rows, self.pad_id, self.model.device)
            found = Supervised().sum(self.model, batch)
        self.model.train(was_training)
        return found


def can_recompute(model: Any) -> bool:
    return bool(getattr(model.get_base_model(), "supports_gradient_checkpointing", False))


def recompute_activations(model: Any) -> None:
    """Let each decoder layer of ``model`` keep its input only, and compute the rest again in the backward
    (Chen et al. 2016, arXiv 1604.06174), and large tensors no pages that others could not use.  Raises
    ConfigError if the model cannot."""
    base = model.get_base_model()
    if not can_recompute(model):
        raise ConfigError(f"activation_checkpointing: {type(base).__name__} has no layers that can do it")
    base.activation_checkpointing_enable({"use_reentrant": False})
    keep_large_blocks_apart(True)
    base.disable_input_require_grads()  # which only the reentrant kind needs, and a backward pays for


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
