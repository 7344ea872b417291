"""The low-rank update of a whole parameter: one matrix, or a stack of one matrix an expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MATRIX = 2  # dimensions
Update = tuple[Tensor, Tensor, float]  # lora_a, lora_b, scale


def expert_factors(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's stacked factors by expert: (experts, rank, in) and (experts, out, rank).

    lora_a (experts * rank, in) counts all ranks of an expert before the next expert, lora_b
    (out, rank * experts) all experts of a rank before the next rank (PEFT 0.21.2, lora.ParamWrapper)."""
    by_expert = lora_b.reshape(lora_b.shape[0], -1, experts).permute(2, 0, 1)
    return lora_a.reshape(experts, -1, lora_a.shape[-1]), by_expert


def add_expert_updates(weight: Tensor, updates: Sequence[Update], *, transposed: bool = False) -> Tensor:
    """``weight`` plus ``scale * B A`` of each update, for each expert, in the dtype of ``weight``.

    Shapes: weight (experts, out, in), with ``transposed`` (experts, in, out), or one matrix (out, in).
    All updates are one product that is added as it is made: no dense update is held, and half-precision
    numbers are rounded once."""
    stack = weight.unsqueeze(0) if weight.dim() == MATRIX else weight
    left, right = _stacked(updates, len(stack), transposed=transposed)
    # Autocast would return its own dtype; a parameter keeps the one that it has.
    with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
        return torch.baddbmm(stack, left.to(weight.dtype), right.to(weight.dtype)).view(weight.shape)


def expert_delta(updates: Sequence[Update], shape: torch.Size, *, transposed: bool = False) -> Tensor:
    """What ``add_expert_updates`` adds to a weight of ``shape``, in float32, or in the factors' float64."""
    experts = 1 if len(shape) == MATRIX else shape[0]
    left, right = _stacked(updates, experts, transposed=transposed)
    wide = torch.promote_types(left.dtype, torch.float32)
    return torch.bmm(left.to(wide), right.to(wide)).view(shape)


def _stacked(updates: Sequence[Update], experts: int, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """The factors of all updates side by side: (experts, rows, ranks) and (experts, ranks, columns)."""
    lefts, rights = [], []
    for lora_a, lora_b, scale in updates:
        a, b = expert_factors(lora_a, lora_b, experts)
        lefts.append(a.mT * scale if transposed else b * scale)
        rights.append(b.mT if transposed else a)
    return torch.cat(lefts, dim=2), torch.cat(rights, dim=1)
