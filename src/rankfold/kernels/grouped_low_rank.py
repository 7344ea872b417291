"""The low-rank updates of a batch whose rows are of several adapters, without a loop over these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Groups:
    """Which of several adapters each row of a batch is of.

    ``rows`` (adapters * most): the rows by adapter, each adapter's filled up to the most that one has;
    ``places`` (rows): where each row stands in that; ``index`` (rows): its adapter; ``is_of_one`` (rows),
    None if every row is of an adapter."""

    rows: Tensor
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
        is_of_one = None if min(index) >= 0 else own >= 0
        return cls(
            torch.tensor(filled, device=device),
            torch.tensor(places, device=device),
            own.clamp_min(0),
            is_of_one,
        )


def stacked(
    factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[Tensor | float]
) -> tuple[Tensor, Tensor]:
    """A (adapters, rank, in) and the scaled B (adapters, rank, out) of factors A (rank, in), B (out, rank).
    Their ranks may differ: what a smaller one lacks is zero."""
    rank = max(lora_a.shape[0] for lora_a, _ in factors)
    scaled = [lora_b.t() * scale for (_, lora_b), scale in zip(factors, scales, strict=True)]
    return (
        torch.stack([_filled(lora_a, rank) for lora_a, _ in factors]),
        torch.stack([_filled(lora_b, rank) for lora_b in scaled]),
    )


def _filled(rows: Tensor, rank: int) -> Tensor:
    return rows if rows.shape[0] == rank else pad(rows, (0, 0, 0, rank - rows.shape[0]))


def add_grouped_update(out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, groups: Groups) -> Tensor:
    """``out`` with the update of each row's own adapter, in its dtype.

    Shapes: out (rows, ..., out), x (rows, ..., in), lora_a (adapters, rank, in) and lora_b (adapters, rank,
    out) as ``stacked`` makes them.  Either the rows are brought together by adapter or each row gets a copy
    of its factors, whichever copies less.  Chen et al. 2023 (Punica, arXiv 2310.18547), section 4."""
    count, (adapters, rank) = x.shape[0], lora_a.shape[:2]
    inputs = x.reshape(count, -1, x.shape[-1]).to(lora_a.dtype)
    outputs = out.reshape(count, -1, out.shape[-1])
    if groups.rows.shape[0] * inputs.shape[1] <= count * rank:
        sorted_rows = inputs.index_select(0, groups.rows).view(adapters, -1, x.shape[-1])
        wide = torch.bmm(torch.bmm(sorted_rows, lora_a.mT), lora_b)
        update = wide.view(-1, *outputs.shape[1:]).index_select(0, groups.places)
        if groups.is_of_one is not None:
            update = update * groups.is_of_one[:, None, None]
        return (outputs + update.to(out.dtype)).view(out.shape)
    narrow = torch.bmm(inputs, lora_a.index_select(0, groups.index).mT)
    if groups.is_of_one is not None:
        narrow = narrow * groups.is_of_one[:, None, None]
    own_b = lora_b.index_select(0, groups.index)
    if outputs.dtype == own_b.dtype and not torch.is_autocast_enabled(out.device.type):
        return torch.baddbmm(outputs, narrow, own_b).view(out.shape)
    return (outputs + torch.bmm(narrow, own_b).to(out.dtype)).view(out.shape)
