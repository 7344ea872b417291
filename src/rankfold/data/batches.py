"""Which rows go together: shuffled by seed, grouped by length, cut to a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rankfold.data.encode import IGNORE, EncodedRow

MICRO_BATCH_TOKENS = 1024  # padded tokens in one forward; larger ones gain no speed on two cores
WINDOW_STEPS = 8  # rows of this many steps are sorted by length together

MicroBatch = list[EncodedRow]


def epoch_steps(rows: list[EncodedRow], rows_per_step: int, seed: int) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each optimiser step of one epoch; every row comes once.

    Rows of similar length share a step, so that little is padded; which rows and in which order is
    random, and the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    window = rows_per_step * WINDOW_STEPS
    steps = []
    for start in range(0, len(shuffled), window):
        by_length = sorted(shuffled[start : start + window], key=len)
        steps += [by_length[i : i + rows_per_step] for i in range(0, len(by_length), rows_per_step)]
    for place in torch.randperm(len(steps), generator=generator):
        yield micro_batches(steps[place])


def micro_batches(rows: list[EncodedRow]) -> list[MicroBatch]:
    """Cut ``rows`` into groups of at most MICRO_BATCH_TOKENS padded tokens, shortest rows first."""
    groups: list[MicroBatch] = []
    for row in sorted(rows, key=len):
        if groups and len(row) * (len(groups[-1]) + 1) <= MICRO_BATCH_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def collate(rows: MicroBatch, pad_id: int, device: Any) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each (rows, longest), padded on the right."""
    longest = max(len(row) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([ids + [fill] * (longest - len(ids)) for ids in lists], device=device)

    return {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORE),
    }
