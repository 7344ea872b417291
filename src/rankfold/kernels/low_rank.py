"""The low-rank linear update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def low_rank_update(x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The adapter's share of the output, ``scale * x A^T B^T``.

    Shapes: x (..., in), lora_a (rank, in), lora_b (out, rank) -> (..., out), in the dtype of the
    factors.  The scale meets the narrow (..., rank) product, where it is cheapest.
    Hu et al. 2021 (arXiv 2106.09685), section 4.1."""
    return F.linear(F.linear(x.to(lora_a.dtype), lora_a) * scale, lora_b)


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The dense weight change ``scale * B A`` (out, in), in float32, or in float64 if the factors are."""
    if lora_a.dtype != torch.float64:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    return scale * (lora_b @ lora_a)
