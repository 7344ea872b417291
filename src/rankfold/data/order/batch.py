"""One forward's worth of rows: what goes in, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.data.tokens.encode import IGNORE, EncodedRow


@dataclass(frozen=True, eq=False)
class Targets:
    """After the token at each of ``places``, counted through the batch, the one in ``tokens`` is wanted; its
    loss counts ``weights`` times, and it is of the row numbered in ``rows``.

    All four are (trained tokens).  ``weight`` is the sum of the weights, known without asking the device."""

    places: Tensor
    tokens: Tensor
    weights: Tensor
    rows: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Batch:
    """``inputs`` of the model's forward by their names, of which ``input_ids`` is (sequences, length)."""

    inputs: dict[str, Tensor]
    targets: Targets


def targets_of(rows: Sequence[EncodedRow], starts: Sequence[int], device: Any) -> Targets:
    """The targets of ``rows`` that begin at ``starts`` of a batch.  A row's first token is never one, as
    nothing of its row stands before it."""
    places, tokens, weights, numbers = [], [], [], []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        labels = np.array(row.labels[1:], np.int64)
        trained = np.flatnonzero(labels != IGNORE)
        places.append(start + trained)
        tokens.append(labels[trained])
        counts = np.ones(len(labels)) if row.weights is None else np.array(row.weights[1:])
        weights.append(counts[trained].astype(np.float32))
        numbers.append(np.full(len(trained), number))
    weight = float(sum(part.sum(dtype=np.float64) for part in weights))

    def put(parts: list[Any]) -> Tensor:
        return sent(torch.from_numpy(np.concatenate(parts)), device)

    return Targets(put(places), put(tokens), put(weights), put(numbers), weight)


def sent(tensor: Tensor, device: Any) -> Tensor:
    """``tensor`` on ``device``; to a card it goes from pinned memory, while the CPU works on."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
