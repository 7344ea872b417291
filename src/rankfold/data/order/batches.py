"""Which rows go together: shuffled by seed, grouped by length, cut to a token budget.

The order is a function of the rows' lengths, the seed and the epoch, and of nothing else.  So (epoch, step)
says all there is to say about where a run stands, and every process works out the same steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch

from rankfold.data.tokens.cache import lengths_of
from rankfold.data.tokens.encode import EncodedRow

MICRO_BATCH_TOKENS = 1024  # padded tokens in one forward; larger ones gain no speed on two cores
GPU_MICRO_BATCH_TOKENS = 16384  # there, where they fit: starting a small operation takes longer than it does
WINDOW_STEPS = 32  # rows of this many steps are sorted by length together
LEAST_WINDOWS = 4  # in an epoch of few rows: with one, the same rows would share a step in every epoch

MicroBatch = list[EncodedRow]


def micro_batch_tokens(device: torch.device) -> int:
    """The most tokens that a micro-batch should have on ``device``, memory aside."""
    return MICRO_BATCH_TOKENS if device.type == "cpu" else GPU_MICRO_BATCH_TOKENS


def epoch_steps(
    rows: Sequence[EncodedRow], rows_per_step: int, seed: int, epoch: int = 0, start: int = 0
) -> Iterator[list[EncodedRow]]:
    """The rows of each optimiser step of one epoch from step ``start`` on, shortest first; over the whole
    epoch every row comes once.

    Rows of similar length share a step, so that little is padded; which rows, and the order of steps,
    are random, and the same for the same ``seed`` and ``epoch``."""
    for step in epoch_order(lengths_of(rows), rows_per_step, seed, epoch)[start:]:
        yield [rows[place] for place in step]


def epoch_order(lengths: Sequence[int], rows_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The numbers of the rows of each step of an epoch."""
    mixed = blake2b(f"{seed} {epoch}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed))
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    window = rows_per_step * min(WINDOW_STEPS, max(1, len(lengths) // rows_per_step // LEAST_WINDOWS))
    steps = []
    for start in range(0, len(shuffled), window):
        by_length = sorted(shuffled[start : start + window], key=lengths.__getitem__)
        steps += [by_length[i : i + rows_per_step] for i in range(0, len(by_length), rows_per_step)]
    return [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]


def share(rows: list[EncodedRow], process: int, processes: int) -> list[EncodedRow]:
    """The rows of a step that one of several processes works on: every row is in one process's share, and
    the shares are of similar length.  A share is empty where there are fewer rows than processes."""
    return rows[process::processes]


def micro_batches(rows: Sequence[EncodedRow], tokens: int = MICRO_BATCH_TOKENS) -> list[MicroBatch]:
    """Cut ``rows`` into groups of at most ``tokens`` padded tokens, shortest rows first."""
    groups: list[MicroBatch] = []
    for row in sorted(rows, key=len):
        if groups and len(row) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
