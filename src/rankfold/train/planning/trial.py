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
from rankfold.models.base.memory import free_memory_bytes, free_swap_bytes
from rankfold.models.base.precision import Precision
from rankfold.train.planning.peak import step_memory
from rankfold.train.planning.recomputing import Activations, can_recompute, recompute_activations
from rankfold.train.step.objectives import Supervised

SMALL, LARGE = 1 / 8, 3 / 8  # of a full micro-batch: enough to tell what a call and what a token takes
PROBE_TOKENS = 256
SMALLER = (
    "leave out long rows (max_length), hold the weights in fewer bytes (stored), take a lower rank, or close "
    "other programs"
)


@dataclass(frozen=True)
class Cost:
    """Seconds that a micro-batch takes, forward and backward: some for the call and some for each token, the
    padding too; ``forward`` is the share of the forward in them.  ``loss`` is that of the rows that were
    tried, in nats a trained token."""

    per_call: float
    per_token: float
    forward: float
    loss: float = 0.0

    def times(self, factor: float) -> Cost:
        return replace(self, per_call=factor * self.per_call, per_token=factor * self.per_token)

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
        self, batching: Batching, largest: int, recompute: bool | None = None, *, fixed: bool = False
    ) -> tuple[Batching, Activations]:
        """``batching`` with as many tokens as fit into the free memory, or as it is if ``fixed``, and whether
        activations are recomputed, as the model does from then on: only if those of the longest row do not
        fit, or as given by ``recompute``.  ``largest`` are the tokens of the run's largest micro-batch; if
        that does not fit by itself, the process holds on to less of what it frees.

        Raises ConfigError where not even that row fits."""
        free, longest = free_memory_bytes(self.model.device), max(map(len, self.rows))
        kept, fits = self._fitting(batching, free)
        reason = f"keeping them takes {kept * largest / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        if fits < largest:
            keep_large_blocks_apart(True)
            kept, fits = self._fitting(batching, free, apart=True)
        if recompute is None:
            recompute = fits < (largest if fixed else longest) and can_recompute(self.model)
        if recompute:
            recompute_activations(self.model)
            kept, fits = self._fitting(batching, free, apart=True)
        self._refuse_too_long(longest, kept * longest, free)
        if fixed:
            return batching, Activations(recompute, reason)
        most = MICRO_BATCH_TOKENS if recompute else batching.tokens
        fitting: Any = replace(cast(Any, batching), tokens=min(most, batching.tokens, max(fits, longest)))
        return fitting, Activations(recompute, reason)

    def _fitting(self, batching: Batching, free: int, *, apart: bool = False) -> tuple[float, int]:
        """The bytes that a token keeps, and how many tokens fit into ``free`` bytes."""
        kept, dtype = self.kept_bytes_per_token(batching), self.precision.compute
        return kept, step_memory(self.model).most_tokens(free, kept, dtype, apart=apart)

    def _refuse_too_long(self, longest: int, kept: float, free: int) -> None:
        needed = step_memory(self.model).used(longest, kept, self.precision.compute)
        room = free + free_swap_bytes(self.model.device)
        if needed > room:
            raise ConfigError(
                f"the longest row, of {longest:,} tokens, does not fit: beside the weights it takes "
                f"{needed / 1e9:.2f} GB, and {room / 1e9:.2f} GB are free; {SMALLER}"
            )

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


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
