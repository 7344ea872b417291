"""The low-rank updates of a batch whose rows are of several adapters, without a loop over these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Groups:
    """Which of several adapters each row of a batch is of.

    ``rows`` (adapters * most): the rows by adapter, each adapter's filled up to the most that one has, None
    where they stand so already; ``places`` (rows): where each row stands in that; ``index`` (rows): its
    adapter; ``is_of_one`` (rows), None if every row is of an adapter."""

    rows: Tensor | None
    places: Tensor
    index: Tensor
    is_of_one: Tensor | None

    @classmethod
    def of(cls, index: Sequence[int], count: int, device: torch.device) -> Groups:
        """``index``: for each row its adapter among ``count``, -1 for none."""
        rows_of = [[row for row, own in enumerate(index) if own == each] for each in range(count)]
        most = max(map(len, rows_of))
        places = [0] * len(index)
        for each, rows in enumerate(rows_of):
            for place, row in enumerate(rows):
                places[row] = each * most + place
        filled = [row for rows in rows_of for row in (*rows, *[0] * (most - len(rows)))]
        own = torch.tensor(index, device=device)
        stand_so = min(index) >= 0 and filled == [*range(len(index))]
        return cls(
            None if stand_so else torch.tensor(filled, device=device),
            torch.tensor(places, device=device),
            own.clamp_min(0),
            None if min(index) >= 0 else own >= 0,
        )


class Stack(NamedTuple):
    """A (adapters, rank, in), B (adapters, out, rank) and the scales (adapters)."""

    lora_a: Tensor
    lora_b: Tensor
    scales: Tensor


def stacked(factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[Tensor | float]) -> Stack:
    """Factors A (rank, in) and B (out, rank) of adapters one above the other.  Their ranks may differ: what a
    smaller one lacks is zero."""
    rank = max(lora_a.shape[0] for lora_a, _ in factors)
    like = factors[0][0]
    return Stack(
        torch.stack([_filled(lora_a, rank) for lora_a, _ in factors]),
        torch.stack([_filled(lora_b.mT, rank).mT for _, lora_b in factors]),
        torch.tensor([float(scale) for scale in scales], device=like.device, dtype=like.dtype),
    )


def _filled(rows: Tensor, rank: int) -> Tensor:
    return rows if rows.shape[0] == rank else pad(rows, (0, 0, 0, rank - rows.shape[0]))


def add_grouped_update(out: Tensor, x: Tensor, stack: Stack, groups: Groups) -> Tensor:
    """``out`` with the update of each row's own adapter, in its dtype.

    Shapes: out (rows, ..., out), x (rows, ..., in).  Where the rows do not stand together by adapter, either
    they are brought together or each gets a copy of its factors, whichever copies less.
    Chen et al. 2023 (Punica, arXiv 2310.18547), section 4."""
    count, (adapters, rank) = x.shape[0], stack.lora_a.shape[:2]
    inputs = x.reshape(count, -1, x.shape[-1]).to(stack.lora_a.dtype)
    outputs = out.reshape(count, -1, out.shape[-1])
    if groups.rows is None:
        together = inputs.view(adapters, -1, x.shape[-1]), stack.scales[:, None, None]
        total = _added(outputs.view(adapters, -1, out.shape[-1]), *together, stack.lora_a, stack.lora_b)
    elif groups.rows.shape[0] * inputs.shape[1] <= count * rank:
        sorted_rows = inputs.index_select(0, groups.rows).view(adapters, -1, x.shape[-1])
        narrow = torch.bmm(sorted_rows, stack.lora_a.mT) * stack.scales[:, None, None]
        wide = torch.bmm(narrow, stack.lora_b.mT).view(-1, *outputs.shape[1:])
        update = wide.index_select(0, groups.places).to(out.dtype)
        total = outputs + (update if groups.is_of_one is None else update * groups.is_of_one[:, None, None])
    else:
        own_a, own_b, scales = (part.index_select(0, groups.index) for part in stack)
        scales = scales if groups.is_of_one is None else scales * groups.is_of_one
        total = _added(outputs, inputs, scales[:, None, None], own_a, own_b)
    return total.view(out.shape)


def _added(out: Tensor, x: Tensor, scales: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """``out + scale x A^T B^T`` for a batch of products."""
    narrow = torch.bmm(x, lora_a.mT) * scales
    if out.dtype == lora_b.dtype and not torch.is_autocast_enabled(out.device.type):
        return torch.baddbmm(out, narrow, lora_b.mT)
    return out + torch.bmm(narrow, lora_b.mT).to(out.dtype)
