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


def add_low_rank_update(out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``out + scale * x A^T B^T`` in the dtype of ``out`` (..., out); see ``low_rank_update``.

    Where all dtypes agree the wide product, the scale and the sum are one pass over ``out``."""
    alike = out.dtype == x.dtype == lora_a.dtype == lora_b.dtype
    if not alike or out.dim() == 1 or out.is_nested or isinstance(scale, Tensor):
        return out + low_rank_update(x, lora_a, lora_b, scale).to(out.dtype)
    narrow = F.linear(x, lora_a)
    if out.dim() == 2:  # noqa: PLR2004 - a view costs a small layer as much as a product, a factor half of one
        columns = lora_b.t()
        return (
            torch.addmm(out, narrow, columns)
            if scale == 1
            else torch.addmm(out, narrow, columns, alpha=scale)
        )
    total = torch.addmm(out.flatten(0, -2), narrow.flatten(0, -2), lora_b.t(), alpha=scale)
    return total.view(out.shape)


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The dense weight change ``scale * B A`` (out, in), in float32, or in float64 if the factors are."""
    if lora_a.dtype != torch.float64:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    return scale * (lora_b @ lora_a)
