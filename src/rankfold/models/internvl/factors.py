"""The low-rank pair of one module, split for parts of a fused matrix and joined again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rankfold.errors import AdapterError
from rankfold.lora.files.lora_weights import Pair
from rankfold.models.internvl.groups import Groups


def split_pair(pair: Pair, groups: Groups) -> tuple[Pair, Pair, Pair]:
    """The pairs of queries, keys and values: the same A, and each its rows of B.  Exact."""
    parts = groups.split(pair.B)
    rows = {key: groups.split(tensor) for key, tensor in pair.rows.items()}
    first, second, third = (
        replace(pair, B=part, rows={key: own[place] for key, own in rows.items()})
        for place, part in enumerate(parts)
    )
    return first, second, third


def join_pairs(pairs: Sequence[Pair | None], groups: Groups) -> Pair:
    """One pair for a fused matrix from those of its queries, keys and values; None is no adapter there.

    Exact: the As that differ stand on top of each other, so the rank is the sum of theirs, and each part's B
    has zeros beside its own columns.  Pairs that share their A keep its rank.  The scale is the first
    pair's; a B of another scale is multiplied by their quotient.

    Raises AdapterError for DoRA on some of the parts only, whose magnitudes on the others are unknown."""
    present = [pair for pair in pairs if pair is not None]
    stack: list[Tensor] = []
    for pair in present:
        stack += [] if any(torch.equal(a, pair.A) for a in stack) else [pair.A]
    scale = present[0].scale
    columns = [
        _zeros(present[0].B, size, stack) if pair is None else _in_its_columns(pair, stack, scale)
        for pair, size in zip(pairs, groups.sizes, strict=True)
    ]
    joined = groups.join(columns[0], columns[1], columns[2])
    return Pair(torch.cat(stack), joined, scale, _joined_rows(pairs, groups))


def _zeros(like: Tensor, rows: int, stack: Sequence[Tensor]) -> Tensor:
    """A B (rows, rank of the whole stack) that does nothing."""
    return like.new_zeros(rows, sum(len(a) for a in stack))


def _in_its_columns(pair: Pair, stack: Sequence[Tensor], scale: float) -> Tensor:
    """The pair's B at the columns of its A in the stack, for another ``scale``."""
    wide, start = _zeros(pair.B, len(pair.B), stack), 0
    for a in stack:
        if torch.equal(a, pair.A):
            break
        start += len(a)
    wide[:, start : start + pair.rank] = pair.B if pair.scale == scale else pair.B * (pair.scale / scale)
    return wide


def _joined_rows(pairs: Sequence[Pair | None], groups: Groups) -> dict[str, Tensor]:
    keys = {key for pair in pairs if pair is not None for key in pair.rows}
    joined = {}
    for key in sorted(keys):
        own = [None if pair is None else pair.rows.get(key) for pair in pairs]
        if "magnitude" in key and any(tensor is None for tensor in own):
            raise AdapterError("DoRA on a part of a fused matrix has no magnitudes for the rest of it")
        like = next(tensor for tensor in own if tensor is not None)
        parts = [
            like.new_zeros(size) if tensor is None else tensor
            for tensor, size in zip(own, groups.sizes, strict=True)
        ]
        joined[key] = groups.join(parts[0], parts[1], parts[2])
    return joined
